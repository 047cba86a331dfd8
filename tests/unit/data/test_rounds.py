"""Failed rows tried again: each exactly once a round, joined, resumed, and merged in the place of what was there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from hpcinfer.data.generations import GenerationFile
from hpcinfer.data.ledger.claims import NoClaim
from hpcinfer.data.ledger.coverage import Coverage
from hpcinfer.data.ledger.merge import IncompleteRunError, merge_run
from hpcinfer.data.ledger.rounds import check_truncation, choose_round
from hpcinfer.data.ledger.run_directory import RunDirectory, create_or_open
from hpcinfer.data.ledger.status import read_status
from hpcinfer.data.ledger.writers import WriterIdentity, register_writer
from hpcinfer.errors import RunDirectoryError
from hpcinfer.request import Generation, Status
from tests.faults.shim.harness import identity, stub_generation
from tests.unit.data.lives import Clock, Life

NUM_ROWS = 70  # rows 3, 10, 17 ... fail: ten of them
FAILED = list(range(3, NUM_ROWS, 7))


def mended(row: int, sample: int = 0) -> Generation:
    """Row 3 fails again, with another error; all others are ok."""
    if row == 3:
        return Generation(row=row, sample=sample, status=Status.FAILED, error="still too long")
    return Generation(row=row, sample=sample, status=Status.OK, token_ids=np.arange(3, dtype=np.int32), text=f"now {row}")


def life(run: RunDirectory, retry_round: int = 0, clock: Clock | None = None) -> Life:
    return Life(run, clock or Clock(), WriterIdentity(retry_round=retry_round), num_rows=NUM_ROWS)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run that is complete and merged, with failed rows."""
    run = create_or_open(tmp_path / "run", identity(NUM_ROWS))
    first = life(run)
    first.do(first.take_all())
    first.writer.leave()
    assert merge_run(run, NUM_ROWS).num_failed == len(FAILED)
    return run


def outputs(run: RunDirectory) -> dict[int, Generation]:
    with GenerationFile(run.generations) as file:
        assert file.complete
        found = list(file)
    assert [generation.row for generation in found] == list(range(NUM_ROWS))
    return {generation.row: generation for generation in found}


def test_failed_rows_and_no_others_are_tried_again(run: RunDirectory) -> None:
    before = run.generations.read_bytes()
    assert choose_round(run, NUM_ROWS, retry=False) == 0 and choose_round(run, NUM_ROWS, retry=True) == 1
    again = life(run, 1)
    assert not run.is_complete(NUM_ROWS, 1) and not read_status(run).complete
    assert run.generations.read_bytes() == before, "what is there stays until something better is"
    claims = again.take_all()
    assert [row for claim in sorted(claims, key=lambda c: c.start) for row, _, _ in again.ledger.remaining(claim)] == FAILED
    assert again.do(claims, mended) == len(FAILED)
    assert again.ledger.next_claim(idle=True) is NoClaim.DONE, "a row that fails again is done"
    again.writer.leave()
    result = merge_run(run, NUM_ROWS)
    assert (result.num_failed, result.num_ok, result.complete) == (1, NUM_ROWS - 1, True)
    found = outputs(run)
    assert [found[row].text for row in FAILED[1:]] == [f"now {row}" for row in FAILED[1:]]
    assert found[3].error == "still too long", "the last error counts"
    assert all(found[row].text == stub_generation(row).text for row in found if row not in FAILED)
    assert run.is_complete(NUM_ROWS, 1)
    status = read_status(run)
    assert (status.complete, status.num_failed, status.num_left, status.retry_round) == (True, 1, 0, 1)


def test_a_retry_that_ended_early_is_joined_and_gone_on_with(run: RunDirectory) -> None:
    clock = Clock()
    first = life(run, 1, clock)
    claims = first.take_all()
    first.do(claims[:3], mended)
    done = Coverage(run, NUM_ROWS)
    done.refresh()
    first.writer.leave()
    for retry in (True, False):
        assert choose_round(run, NUM_ROWS, retry=retry) == 1
    with pytest.raises(IncompleteRunError):
        merge_run(run, NUM_ROWS)
    partly = run.path / "partly.h5"
    merge_run(run, NUM_ROWS, partly, allow_partial=True)
    with GenerationFile(partly) as file:
        assert not file.complete and len(list(file)) == NUM_ROWS
    one, two = life(run, 1, clock), life(run, 1, clock)
    taken = one.take_all()
    assert two.take_all() == [] and two.ledger.next_claim() is NoClaim.WAIT, "they share the claims"
    assert one.do(taken, mended) == done.num_missing
    assert two.ledger.next_claim() is NoClaim.DONE
    merge_run(run, NUM_ROWS)
    assert outputs(run)[10].text == "now 10"
    assert choose_round(run, NUM_ROWS, retry=True) == 2, "a new wish"


def test_writers_of_a_round_that_is_over_hold_nothing(tmp_path: Path) -> None:
    """Killed on another machine, or just not gone yet: a complete run has no work for them."""
    run, clock = create_or_open(tmp_path / "run", identity(NUM_ROWS)), Clock()
    first = life(run, 0, clock)
    first.do(first.take_all())
    merge_run(run, NUM_ROWS)
    retry = life(run, 1, clock)
    claims = retry.take_all()
    assert len(claims) == len({row // run.claim_size for row in FAILED})
    other = life(run, 1, clock)
    assert other.ledger.next_claim() is NoClaim.WAIT, "those of this round are held"
    assert retry.do(claims) == len(FAILED)


def test_a_writer_of_an_earlier_round_does_not_decide(tmp_path: Path) -> None:
    """It goes on, without knowing of the retry; what fails with it is tried again."""
    run, clock = create_or_open(tmp_path / "run", identity(NUM_ROWS)), Clock()
    old = life(run, 0, clock)
    claims = old.take_all()
    assert choose_round(run, NUM_ROWS, retry=True) == 1
    new = life(run, 1, clock)
    assert new.ledger.next_claim() is NoClaim.WAIT
    assert old.do(claims) == NUM_ROWS and old.ledger.coverage.is_full
    with pytest.raises(IncompleteRunError):
        merge_run(run, NUM_ROWS)
    old.writer.leave()
    assert new.do(new.take_all(), mended) == len(FAILED)
    assert merge_run(run, NUM_ROWS).num_failed == 1


def test_tasks_of_an_array_and_later_lives_of_a_job_join(run: RunDirectory) -> None:
    array = {"cluster": "c", "array": "40"}
    assert choose_round(run, NUM_ROWS, retry=True, job="41", **array) == 1
    first = Life(
        run, Clock(), WriterIdentity(retry_round=1, job="41", cluster="c", array="40"), num_rows=NUM_ROWS
    )
    first.do(first.take_all(), mended)
    first.writer.leave()
    merge_run(run, NUM_ROWS)
    assert run.is_complete(NUM_ROWS, 1)
    assert choose_round(run, NUM_ROWS, retry=True, job="42", **array) == 1, "a task that came late"
    assert choose_round(run, NUM_ROWS, retry=True, job="41", restart_count=1, **array) == 1, "requeued"
    assert choose_round(run, NUM_ROWS, retry=True, job="41", cluster="d", array="40") == 2, "another cluster"
    assert choose_round(run, NUM_ROWS, retry=True, job="50", cluster="c") == 2
    assert choose_round(run, NUM_ROWS, retry=True, job="41", restart_count=0, cluster="c", array="40") == 2, "the same life again"


def test_without_failed_rows_there_is_nothing_to_try(run: RunDirectory) -> None:
    again = life(run, 1)
    again.do(again.take_all(), lambda row, sample: dataclasses.replace(mended(row, sample), status=Status.OK, error=""))
    merge_run(run, NUM_ROWS)
    assert choose_round(run, NUM_ROWS, retry=True) == 1
    assert choose_round(run, NUM_ROWS + 5, retry=True) == 2, "appended rows may have failed"


def test_partial_rows_of_a_retry_go_on(run: RunDirectory) -> None:
    first = life(run, 1)
    first.take_all()
    first.segments.add([stub_generation(10, partial=True)])
    first.segments.flush()
    first.writer.leave()
    second = life(run, 1)
    found = {row: earlier for claim in second.take_all() for row, _, earlier in second.ledger.remaining(claim)}
    assert sorted(found) == FAILED and [row for row in found if found[row] is not None] == [10]


def test_a_retry_may_cut_prompts_that_failed(run: RunDirectory) -> None:
    check_truncation(run, 0, {})
    with pytest.raises(RunDirectoryError, match="--retry-failed"):
        check_truncation(run, 0, {"truncate": "left"})
    check_truncation(run, 1, {"truncate": "left"})
    register_writer(run, WriterIdentity(retry_round=1, truncate="left"))
    check_truncation(run, 1, {"truncate": "left"})
    for retry_round, facts in ((1, {}), (1, {"truncate": "right"}), (2, {"truncate": "right"}), (2, {})):
        with pytest.raises(RunDirectoryError, match="truncate"):
            check_truncation(run, retry_round, facts)
    check_truncation(run, 2, {"truncate": "left"})
