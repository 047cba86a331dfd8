"""The segment writer: thresholds, compaction, and storage that refuses."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from hpcinfer.data.ledger import segment_store
from hpcinfer.data.ledger.commit import claim_name, commit_bytes, create_exclusive, is_transient, read_owner
from hpcinfer.data.ledger.coverage import BadSegments, Coverage, list_segments
from hpcinfer.data.generations import GenerationFile
from hpcinfer.data.ledger.run_directory import RunDirectory, create_or_open
from hpcinfer.data.ledger.segments import SegmentPolicy, SegmentWriter, segment_limit
from hpcinfer.errors import ResumableError, RunDirectoryError
from hpcinfer.request import Status
from tests.faults.shim.harness import identity, stub_generation
from tests.waiting import until

WRITER = "0123456789abcdef"


class Clock:
    """Time that passes by the back-off alone."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, condition: threading.Condition, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return create_or_open(tmp_path / "run", identity(1000))


def rows(*numbers: int) -> list:
    return [stub_generation(row) for row in numbers]


def test_committed_by_rows_bytes_and_age(run: RunDirectory) -> None:
    clock = Clock()
    committed = []
    writer = SegmentWriter(
        run, WRITER, SegmentPolicy(max_rows=3, max_age_s=10, max_bytes=5000), clock=clock, wait=clock.wait,
        on_commit=lambda name, table: committed.append((name, len(table))),
    )
    writer.add(rows(1, 2))
    assert writer.num_committed == 0 and writer.num_waiting == 2
    writer.add(rows(3, 4))
    until(lambda: writer.poll() or writer.num_committed == 3)
    assert writer.num_waiting == 1
    clock.now += 11
    until(lambda: writer.poll() or writer.num_committed == 4)
    big = stub_generation(8)
    writer.add([type(big)(row=8, status=Status.OK, text="z" * 6000)])
    until(lambda: writer.poll() or writer.num_waiting == 0)
    assert committed == [(f"seg-{WRITER}-{i:06d}.h5", n) for i, n in enumerate((3, 1, 1))]
    assert (writer.num_ok, writer.num_failed) == (4, 1)


def test_compaction_bounds_the_files_and_keeps_the_rows(run: RunDirectory) -> None:
    writer = SegmentWriter(run, WRITER, SegmentPolicy(max_rows=1, max_segments=8))
    most = 0
    for row in range(200):
        writer.add(rows(row))
        most = max(most, len(os.listdir(run.segments)))
    writer.close()
    assert writer.num_compactions > 2 and most <= 20
    coverage = Coverage(run, 1000)
    coverage.refresh()
    assert coverage.num_missing == 800


def test_large_segments_are_not_compacted_again(run: RunDirectory) -> None:
    writer = SegmentWriter(run, WRITER, SegmentPolicy(max_rows=1, max_segments=4, compact_bytes=40_000))
    for row in range(100):
        writer.add(rows(row))
    writer.flush()
    names, _ = list_segments(run)
    assert all((run.segments / name).stat().st_size <= 40_000 for name in names)
    coverage = Coverage(run, 1000)
    coverage.refresh()
    assert coverage.num_missing == 900


def test_a_damaged_segment_of_its_own_is_left_out_of_compaction(run: RunDirectory) -> None:
    writer = SegmentWriter(run, WRITER, SegmentPolicy(max_rows=1, max_segments=4))
    writer.add(rows(0))
    writer.flush()
    damaged = run.segments / list_segments(run)[0][0]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    for row in range(1, 12):
        writer.add(rows(row))
    writer.flush()
    assert writer.num_compactions and damaged.exists()
    clock = Clock()
    coverage = Coverage(run, 1000, bad_segments=BadSegments(run, after_s=60, clock=clock))
    coverage.refresh()
    assert coverage.num_missing == 989 and coverage.bad_segments.waiting == (damaged.name,)
    clock.now = 61
    coverage.refresh()
    assert (run.segments / f"{damaged.name}.bad").exists() and damaged.exists()
    coverage.refresh()
    assert coverage.bad_segments.waiting == () and coverage.num_missing == 989


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE])
def test_refused_rows_wait_and_the_back_off_ends(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    clock = Clock()
    attempts = []

    def refuse(folder: Path, name: str, data: bytes) -> None:
        attempts.append(clock.now)
        raise OSError(number, os.strerror(number), str(folder))

    writer = SegmentWriter(
        run, WRITER, SegmentPolicy(max_rows=2, retry_s=100, backoff_s=1), clock=clock, wait=clock.wait
    )
    with monkeypatch.context() as patch:
        patch.setattr(segment_store, "commit_bytes", refuse)
        writer.add(rows(0, 1, 2, 4, 5))
        with pytest.raises(ResumableError, match="(?s)5 rows cannot be written.*refused for 100 s") as caught:
            writer.flush()
        assert clock.now >= 100 and writer.is_refused and writer.num_waiting == 5
        assert isinstance(caught.value.__cause__, OSError)
        waits = [later - earlier for earlier, later in zip(attempts[:-1], attempts[1:], strict=True)]
        assert 5 < len(attempts) < 12 and waits[0] == 1 and max(waits) == 30
        with pytest.raises(ResumableError):
            writer.flush()
        assert len(attempts) == writer.num_retries and attempts[-1] == clock.now, "one more, and no back-off"
    writer.flush()
    assert writer.num_committed == 5 and not writer.is_refused


def test_waiting_rows_do_not_fill_the_memory(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path, name: str, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(segment_store, "commit_bytes", refuse)
    writer = SegmentWriter(run, WRITER, SegmentPolicy(max_rows=2, max_buffer_bytes=100_000))
    with pytest.raises(ResumableError, match="wait in memory"):
        for row in range(0, 10_000, 2):
            writer.add(rows(row, row + 1))
    began = time.monotonic()
    writer.stop()
    assert time.monotonic() - began < 4, "a writer that ends does not sit out the back-off"


def test_a_folder_that_is_gone_is_not_waited_for(run: RunDirectory) -> None:
    run.segments.rmdir()
    writer = SegmentWriter(run, WRITER, SegmentPolicy(max_rows=1))
    writer.add(rows(1))
    with pytest.raises(RunDirectoryError, match="not there"):
        writer.flush()


def test_commit_is_repeatable_and_never_replaces(tmp_path: Path) -> None:
    commit_bytes(tmp_path, "a", b"one")
    commit_bytes(tmp_path, "a", b"one")
    with pytest.raises(RunDirectoryError, match="another content"):
        commit_bytes(tmp_path, "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"one" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("links", [True, False])
def test_exclusive_creation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:
        monkeypatch.setattr(os, "link", _no_link)
    create_exclusive(tmp_path, "run.json", b"mine")
    with pytest.raises(FileExistsError):
        create_exclusive(tmp_path, "run.json", b"yours")
    assert (tmp_path / "run.json").read_bytes() == b"mine" and os.listdir(tmp_path) == ["run.json"]


@pytest.mark.parametrize("links", [True, False])
def test_claim_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:
        monkeypatch.setattr(os, "link", _no_link)
    for owner in "ab":
        (tmp_path / owner).write_text(f'{{"id": "{owner}"}}')
    assert claim_name(tmp_path, "0.0", "a", tmp_path / "a") and not claim_name(tmp_path, "0.0", "b", tmp_path / "b")
    assert claim_name(tmp_path, "0.0", "a", tmp_path / "a"), "EEXIST for what is ours already (a repeated NFS request)"
    assert read_owner(tmp_path, "0.0") == "a" and read_owner(tmp_path, "0.1") is None


def _no_link(source: Path, target: Path) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_kinds_of_trouble() -> None:
    assert is_transient(OSError(errno.ENOSPC, "")) and not is_transient(OSError(errno.EACCES, ""))


@pytest.mark.parametrize(("num_writers", "limit"), [(1, 256), (100, 160), (1000, 16), (100_000, 4)])
def test_segment_limit(num_writers: int, limit: int) -> None:
    assert segment_limit(num_writers) == limit


def test_segments_name_their_run(run: RunDirectory) -> None:
    writer = SegmentWriter(run, WRITER, SegmentPolicy(max_rows=1))
    writer.add(rows(1))
    writer.flush()
    with GenerationFile(run.segments / list_segments(run)[0][0]) as file:
        assert file.run_uuid == run.uuid
