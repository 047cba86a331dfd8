"""Creating, opening and refusing run directories."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import pytest

from hpcinfer.data.ledger.run_directory import RunIdentity, claim_size_for, create_or_open, open_existing, unusable
from hpcinfer.errors import ResumableError, RunDirectoryError

IDENTITY = RunIdentity(
    input_fingerprint="abc",
    num_rows=100,
    model={"config": "c1", "dtype": "float32"},
    sampling={"temperature": 0.0, "seed": 1},
)


def changed(**fields: object) -> RunIdentity:
    return dataclasses.replace(IDENTITY, **fields)


def test_created_once_and_opened_again(tmp_path: Path) -> None:
    run = create_or_open(tmp_path / "parent" / "run", IDENTITY, num_replicas=2)
    content = (run.path / "run.json").read_bytes()
    again = create_or_open(run.path, changed(notes={"other": "host"}), num_replicas=7)
    assert again == run == open_existing(run.path)
    assert (run.path / "run.json").read_bytes() == content
    assert all((run.path / name).is_dir() for name in ("writers", "claims", "segments", "logs"))


@pytest.mark.parametrize(
    ("identity", "words"),
    [
        (changed(model={"config": "c2", "dtype": "float32"}), ["model.config", "'c1'", "'c2'"]),
        (changed(sampling={"temperature": 0.7, "seed": 1}), ["sampling.temperature", "0.0", "0.7"]),
        (changed(sampling={"temperature": 0.0}), ["sampling.seed", "1", "None"]),
        (changed(num_samples=3), ["sampling.n", "1", "3"]),
        (changed(input_fingerprint="xyz"), ["input fingerprint", "abc", "xyz"]),
        (changed(num_rows=99), ["input rows", "100", "99"]),
    ],
)
def test_another_run_is_refused_with_what_differs(tmp_path: Path, identity: RunIdentity, words: list[str]) -> None:
    create_or_open(tmp_path / "run", IDENTITY)
    with pytest.raises(RunDirectoryError) as caught:
        create_or_open(tmp_path / "run", identity)
    assert all(word in str(caught.value) for word in [*words, "data.output"])


def test_rows_appended_to_the_same_input(tmp_path: Path) -> None:
    run = create_or_open(tmp_path / "run", IDENTITY)
    grown = changed(num_rows=150, input_fingerprint="whole")
    assert create_or_open(run.path, grown, prefix_fingerprint={100: "abc"}.__getitem__).num_rows == 100
    with pytest.raises(RunDirectoryError, match="first 100 rows"):
        create_or_open(run.path, grown, prefix_fingerprint=lambda num_rows: "changed")
    with pytest.raises(RunDirectoryError):
        create_or_open(run.path, grown)


def test_wrong_places(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(RunDirectoryError, match="file is in its place"):
        create_or_open(file, IDENTITY)
    with pytest.raises(RunDirectoryError, match="cannot be used"):
        create_or_open(file / "below", IDENTITY)
    with pytest.raises(RunDirectoryError, match="parent folders are missing") as caught:
        create_or_open(tmp_path / "a" / "b" / "run", IDENTITY)
    assert str(tmp_path) in caught.value.found
    with pytest.raises(RunDirectoryError, match="not a run directory"):
        open_existing(tmp_path / "nothing")
    with pytest.raises(RunDirectoryError, match="not a run directory"):
        open_existing(tmp_path)


def test_output_without_run_json_is_not_taken_over(tmp_path: Path) -> None:
    run = create_or_open(tmp_path / "run", IDENTITY)
    (run.segments / "seg-0000000000000000-000000.h5").write_bytes(b"")
    (run.path / "run.json").unlink()
    with pytest.raises(RunDirectoryError, match="run.json is missing"):
        create_or_open(run.path, IDENTITY)


def test_files_of_the_user_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "slurm-17.out").write_text("log")
    create_or_open(tmp_path / "run", IDENTITY)


@pytest.mark.parametrize("content", [b"", b"{", b'{"format": "hpcinfer-run", "version": 1}', b"[]"])
def test_damaged_run_json(tmp_path: Path, content: bytes) -> None:
    run = create_or_open(tmp_path / "run", IDENTITY)
    (run.path / "run.json").write_bytes(content)
    with pytest.raises(RunDirectoryError):
        open_existing(run.path, sleep=lambda seconds: None)


@pytest.mark.parametrize(("number", "is_full"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False), (errno.ESTALE, False)])
def test_troubles_that_may_pass(number: int, is_full: bool) -> None:
    """They come to readers too, whom free space would not help."""
    error = unusable(Path("run"), OSError(number, os.strerror(number)))
    assert isinstance(error, ResumableError) and "cannot be used now" in error.problem
    assert ("free space" in error.fix) == is_full


def test_another_version(tmp_path: Path) -> None:
    run = create_or_open(tmp_path / "run", IDENTITY)
    facts = json.loads((run.path / "run.json").read_text())
    (run.path / "run.json").write_text(json.dumps({**facts, "version": 2}))
    with pytest.raises(RunDirectoryError, match="another version"):
        open_existing(run.path)


@pytest.mark.parametrize(
    ("num_rows", "num_replicas", "size"),
    [(0, 1, 1), (10, 2, 1), (640, 2, 10), (100_000, 1, 64), (2_000_000, 4, 100), (10**10, 1000, 65_536)],
)
def test_claim_size(num_rows: int, num_replicas: int, size: int) -> None:
    assert claim_size_for(num_rows, num_replicas) == size
