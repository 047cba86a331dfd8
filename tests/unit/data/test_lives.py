"""Another life of a Slurm job begins only if the last ones got somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time

import pytest

from hpcinfer.data.ledger.lives import check_lives, lives_of_job
from hpcinfer.data.ledger.run_directory import RunDirectory, create_or_open
from hpcinfer.data.ledger.segments import SegmentPolicy, SegmentWriter
from hpcinfer.data.ledger.writers import Leaving, Writer, WriterIdentity, register_writer, writer_ids
from hpcinfer.errors import ExitCode, LivesError
from hpcinfer.launch import lives
from tests.faults.shim.harness import identity, stub_generation

NUM_ROWS = 50


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return create_or_open(tmp_path / "run", identity(NUM_ROWS))


def live(
    run: RunDirectory, restart_count: int, *, rows: int = 0, partial: bool = False, job: str = "7", number: int | None = None, **facts
) -> Writer:
    """A life that commits some rows and is killed. `number`: in the order of the writers' ids; by default random."""
    who = WriterIdentity(job=job, cluster="c", restart_count=restart_count, **facts)
    writer = register_writer(run, who) if number is None else register_writer(run, who, draw_id=lambda: f"{number:016x}")
    writer.set_state("running")
    segments = SegmentWriter(run, writer.id, SegmentPolicy())
    segments.add([stub_generation(row, partial=partial) for row in range(rows)])
    segments.flush()
    return writer


def check(run: RunDirectory, restart_count: int, *, job: str = "7", max_lives: int = 100, cluster: str = "c") -> None:
    check_lives(run, NUM_ROWS, job=job, cluster=cluster, restart_count=restart_count, max_lives=max_lives)


def script_says(run: RunDirectory, before: str = "") -> str:
    """What a batch script, which no longer has the program, says of a life: rows, waited or nothing."""
    functions = re.search(r"^writers\(\).*^outcome\(\).*?^}$", lives.BEFORE, re.MULTILINE | re.DOTALL).group(0)
    words = f"run={shlex.quote(str(run.path))}\nwriters_before={shlex.quote(before)}\n{functions}\noutcome"
    result = subprocess.run(["bash", "-c", words], env={**os.environ, "SLURM_JOB_ID": "7"}, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    return result.stdout.strip()


def test_two_lives_without_anything_committed_are_the_last(run):
    live(run, 0, rows=3)
    first = live(run, 1)
    check(run, 2)
    second = live(run, 2)
    (run.logs / "20261126T100000-job7-rank0.log").touch()
    (run.logs / "20261126T110000-job7-rank0.log").touch()
    (run.logs / "20261126T110000-job70-rank0.log").touch()
    with pytest.raises(LivesError) as caught:
        check(run, 3)
    text = str(caught.value)
    assert caught.value.exit_code == ExitCode.FAILED
    for words in ("job 7", first.id, second.id, "T100000-job7-rank0.log", "T110000-job7-rank0.log", "new job"):
        assert words in text
    assert "job70" not in text
    check(run, 3, job="8")
    check(run, 3, cluster="d")
    check(run, 0)


@pytest.mark.parametrize("partial", [False, True], ids=["rows", "partial rows"])
def test_a_life_that_committed_something_counts(run, partial):
    live(run, 0)
    before = live(run, 1, rows=1, partial=partial).id
    assert script_says(run) == "rows"
    live(run, 2)
    assert script_says(run, before) == "nothing"
    check(run, 3)


def test_one_replica_of_a_life_is_enough(run):
    before = live(run, 0).id
    assert script_says(run, before) == "nothing", "a life that did not come so far"
    for number in range(3):
        live(run, 1, rows=number == 1, number=number)
    assert script_says(run, before) == "rows"
    check(run, 2)


@pytest.mark.parametrize(
    ("end", "barren"),
    [
        (lambda writer: writer.leave(Leaving.NO_ROWS), False),
        (lambda writer: writer.leave(Leaving.DONE), False),
        (lambda writer: writer.set_state("idle"), False),
        (lambda writer: writer.set_state("merging"), False),
        (lambda writer: writer.leave(Leaving.DRAINED), True),
        (lambda writer: writer.leave(Leaving.FAILED), True),
        (lambda writer: writer.set_state("loading"), True),
    ],
    ids=["no rows", "done", "idle", "merging", "drained", "failed", "loading"],
)
def test_only_lives_that_had_rows_to_do(run, end, barren):
    """Waiting for others, or killed in the merge: nothing is wrong with that."""
    for count in range(2):
        before = "\n".join(writer_ids(run))
        end(live(run, count))
        assert script_says(run, before) == ("nothing" if barren else "waited")
    assert [life.is_barren for life in lives_of_job(run, job="7", cluster="c")] == [barren, barren]
    if barren:
        with pytest.raises(LivesError):
            check(run, 2)
    else:
        check(run, 2)


def test_starts_outside_slurm_are_nobodys_affair(run):
    for _ in range(3):
        live(run, 0, job="")
    check(run, 0, job="")
    check(run, 5, job="")


def test_a_merge_by_hand_is_no_life(run):
    live(run, 0)
    live(run, 1, role="merge")
    check(run, 2)


def test_a_job_that_runs_several_runs_is_judged_by_its_lives_in_this_one(run):
    check(run, 5)
    live(run, 5)
    check(run, 6)


def test_the_number_of_lives_is_bounded(run):
    live(run, 3, rows=1)
    check(run, 4, max_lives=5)
    with pytest.raises(LivesError, match="6 times; run.max_lives allows 5"):
        check(run, 5, max_lives=5)
    check(run, 5, max_lives=5, job="")


def test_a_complete_run_is_never_refused(run):
    live(run, 0)
    live(run, 1)
    run.generations.touch()
    run.write_done({"num_rows": NUM_ROWS, "ok": NUM_ROWS, "failed": 0}, "00" * 8)
    check(run, 200)


def test_it_is_quick_with_many_segments(run):
    for index in range(10_000):
        (run.segments / f"seg-{index % 50:016x}-{index:06d}.h5").touch()
    for count in range(3):
        live(run, count, rows=1)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        check(run, 3)
        times.append(time.perf_counter() - began)
    assert min(times) < 1
