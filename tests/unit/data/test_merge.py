"""The merge: sorted, each key once, refused while rows are missing."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from hpcinfer.data.ledger.coverage import BadSegments, list_segments, segment_name
from hpcinfer.data.ledger.commit import commit_bytes
from hpcinfer.data.generations import GenerationFile, encode_generations
from hpcinfer.data.ledger.liveness import Liveness
from hpcinfer.data.ledger.merge import IncompleteRunError, claim_merge, merge_run, remove_leftovers
from hpcinfer.data.ledger.run_directory import RunDirectory, create_or_open
from hpcinfer.data.ledger.writers import WriterIdentity, register_writer
from hpcinfer.errors import DataError
from hpcinfer.request import Generation, Status
from tests.faults.shim.harness import check_output, identity, stub_generation


def scatter(run: RunDirectory, num_rows: int, num_segments: int, seed: int = 1) -> None:
    """All (row, sample) over segments of two writers, in random order."""
    keys = [(row, sample) for row in range(num_rows) for sample in range(run.num_samples)]
    random.Random(seed).shuffle(keys)
    for index in range(num_segments):
        part = [stub_generation(*key) for key in keys[index::num_segments]]
        commit_bytes(run.segments, segment_name("ab"[index % 2] * 16, index), encode_generations(part, run.uuid))


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("range_bytes", [500, 20_000, 2**25])
def test_sorted_and_complete(tmp_path: Path, num_samples: int, range_bytes: int) -> None:
    run = create_or_open(tmp_path / "run", identity(500, num_samples))
    scatter(run, 500, 13)
    result = merge_run(run, 500, range_bytes=range_bytes)
    assert result.complete and result.num_missing == 0 and result.num_duplicates == 0
    check_output(run, 500)
    assert run.is_complete(500) and not run.is_complete(501)
    assert run.read_done()["ok"] == result.num_ok and result.num_failed > 0


def test_more_bins_than_one_row_each(tmp_path: Path) -> None:
    run = create_or_open(tmp_path / "run", identity(40_000))
    scatter(run, 40_000, 7)
    assert merge_run(run, 40_000, range_bytes=100_000).complete
    check_output(run, 40_000)


def test_empty_input(tmp_path: Path) -> None:
    run = create_or_open(tmp_path / "run", identity(0))
    assert merge_run(run, 0).complete
    check_output(run, 0)


def test_duplicates_by_the_rule(tmp_path: Path) -> None:
    run = create_or_open(tmp_path / "run", identity(4))

    def put(writer: str, sequence: int, *rows: tuple[int, Status, str]) -> None:
        part = [Generation(row=row, status=status, text=text) for row, status, text in rows]
        commit_bytes(run.segments, segment_name(writer * 16, sequence), encode_generations(part, run.uuid))

    put("b", 0, (0, Status.OK, "b0"), (1, Status.FAILED, "b0"), (2, Status.PARTIAL, "b0"), (3, Status.OK, "b0"))
    put("a", 10, (0, Status.OK, "a10"), (1, Status.OK, "a10"), (2, Status.FAILED, "a10"), (3, Status.PARTIAL, "a10"))
    put("a", 9, (0, Status.OK, "a9"))
    result = merge_run(run, 4)
    assert result.num_duplicates == 5
    with GenerationFile(run.generations) as file:
        assert [g.text for g in file] == ["a9", "a10", "a10", "b0"]


def test_incomplete_runs_are_refused_with_the_counts(tmp_path: Path) -> None:
    run = create_or_open(tmp_path / "run", identity(30))
    part = [stub_generation(row) for row in range(10)] + [stub_generation(row, partial=True) for row in (20, 21)]
    commit_bytes(run.segments, segment_name("a" * 16, 0), encode_generations(part, run.uuid))
    with pytest.raises(IncompleteRunError) as caught:
        merge_run(run, 30)
    assert "9 ok, 1 failed, 2 partial, 18 missing of 30" in str(caught.value) and caught.value.exit_code == 3
    assert os.listdir(run.path / "segments") == [segment_name("a" * 16, 0)] and not run.generations.exists()
    result = merge_run(run, 30, tmp_path / "out.h5", allow_partial=True)
    assert (result.num_ok, result.num_partial, result.complete) == (9, 2, False)
    with GenerationFile(tmp_path / "out.h5") as file:
        assert len(file) == 12 and not file.complete
    assert run.read_done() is None
    with pytest.raises(DataError, match="exists"):
        merge_run(run, 30, tmp_path / "out.h5", allow_partial=True)
    with pytest.raises(DataError, match="no folder .*nowhere"):
        merge_run(run, 30, tmp_path / "nowhere" / "out.h5", allow_partial=True)


@pytest.mark.parametrize("damage", ["cut", "flip", "foreign"])
def test_a_damaged_segment_is_marked_and_left_out(tmp_path: Path, damage: str) -> None:
    run = create_or_open(tmp_path / "run", identity(100))
    scatter(run, 100, 4)
    victim = run.segments / list_segments(run)[0][1]
    image = bytearray(victim.read_bytes())
    if damage == "flip":
        image[image.index("answer to".encode()) + 3] ^= 4
    victim.write_bytes(
        {"cut": image[:-50], "flip": image, "foreign": encode_generations([stub_generation(0)], "another run")}[damage]
    )
    now = [0.0]
    said = []
    bad = BadSegments(run, after_s=60, clock=lambda: now[0], say=said.append)

    def sleep(seconds: float) -> None:
        now[0] += seconds

    with pytest.raises(IncompleteRunError, match="25 missing of 100.*1 damaged"):
        merge_run(run, 100, bad_segments=bad, sleep=sleep)
    assert 60 <= now[0] < 70
    assert said == [f"{victim.name} cannot be read: it is tried for 60 s, and its rows are missing after that"]
    assert victim.exists() and (run.segments / f"{victim.name}.bad").read_text()


def test_a_segment_that_shows_late_is_waited_for(tmp_path: Path) -> None:
    """A parallel file system may show the name before the content."""
    run = create_or_open(tmp_path / "run", identity(100))
    scatter(run, 100, 4)
    victim = run.segments / list_segments(run)[0][1]
    image = victim.read_bytes()
    victim.write_bytes(b"")
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if now[0] > 5:
            victim.write_bytes(image)

    assert merge_run(run, 100, bad_segments=BadSegments(run, clock=lambda: now[0]), sleep=sleep).complete
    check_output(run, 100)
    assert not list(run.segments.glob("*.bad"))


def test_compacted_segments_count_once(tmp_path: Path) -> None:
    """Killed between the commit of the compacted segment and the removal of the old ones."""
    run = create_or_open(tmp_path / "run", identity(60))
    rows = [stub_generation(row) for row in range(60)]
    for sequence, part in enumerate((rows[:20], rows[20:40], rows[40:], rows[:40])):
        commit_bytes(run.segments, segment_name("a" * 16, sequence), encode_generations(part, run.uuid))
    assert merge_run(run, 60).num_duplicates == 40
    check_output(run, 60)


def test_one_merger_and_its_successor(tmp_path: Path) -> None:
    run = create_or_open(tmp_path / "run", identity(10))
    one, two = register_writer(run, WriterIdentity()), register_writer(run, WriterIdentity())
    liveness = Liveness(run)
    assert claim_merge(run, one.id, liveness) and claim_merge(run, one.id, liveness)
    assert not claim_merge(run, two.id, liveness)
    one.leave()
    assert claim_merge(run, two.id, Liveness(run))
    assert sorted(os.listdir(run.claims)) == ["merge.0", "merge.1"]


def test_grown_input_is_merged_again(tmp_path: Path) -> None:
    run = create_or_open(tmp_path / "run", identity(100))
    scatter(run, 100, 4)
    merge_run(run, 100)
    more = [stub_generation(row) for row in range(100, 130)]
    commit_bytes(run.segments, segment_name("c" * 16, 0), encode_generations(more, run.uuid))
    assert merge_run(run, 130).complete and run.is_complete(130)
    check_output(run, 130)


def test_leftovers_of_the_dead_alone_are_removed(tmp_path: Path) -> None:
    run = create_or_open(tmp_path / "run", identity(10))
    dead, live = register_writer(run, WriterIdentity()), register_writer(run, WriterIdentity())
    dead.leave()
    for life in (dead, live):
        (run.segments / f".tmp-{segment_name(life.id, 0)}.1.aa").touch()
        (run.path / f".tmp-{life.id}-generations.h5.1.aa").touch()
    assert remove_leftovers(run, Liveness(run)) == 2
    assert all(live.id in str(path) for path in run.path.rglob(".tmp-*"))
