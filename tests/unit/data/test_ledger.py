"""Claims, takeovers, liveness, partial rows, leaving."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.data.ledger import claims as ledger_module
from hpcinfer.data.ledger.claims import Claim, NoClaim
from hpcinfer.data.ledger.liveness import Liveness, Verdict
from hpcinfer.data.ledger.permutation import KeyedPermutation
from hpcinfer.data.ledger.run_directory import RunDirectory, create_or_open
from hpcinfer.data.ledger.writers import WriterIdentity, register_writer
from tests.faults.shim.harness import identity, stub_generation
from tests.unit.data import lives
from tests.unit.data.lives import Clock

NUM_ROWS = 640


class Life(lives.Life):
    def __init__(self, run: RunDirectory, clock: Clock, who: WriterIdentity = WriterIdentity(), num_rows: int = NUM_ROWS) -> None:
        super().__init__(run, clock, who, num_rows=num_rows)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return create_or_open(tmp_path / "run", identity(NUM_ROWS))


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(size: int, key: int) -> None:
    assert sorted(KeyedPermutation(size, key)) == list(range(size))


def test_permutation_depends_on_the_key() -> None:
    orders = {tuple(KeyedPermutation(50, key)) for key in range(200)}
    assert len(orders) == 200
    firsts = np.bincount([order[0] for order in orders], minlength=50)
    assert firsts.max() < 20, "the first claim is spread over all"


def test_claims_are_disjoint_and_cover_the_input(run: RunDirectory) -> None:
    clock = Clock()
    one, two = Life(run, clock), Life(run, clock)
    claims = []
    while True:
        got = [life.ledger.next_claim() for life in (one, two)]
        claims += [claim for claim in got if isinstance(claim, Claim)]
        if not any(isinstance(claim, Claim) for claim in got):
            break
    rows = sorted(row for claim in claims for row in range(claim.start, claim.stop))
    assert rows == list(range(NUM_ROWS))
    assert got == [NoClaim.WAIT, NoClaim.WAIT]


def test_done_when_all_is_committed(run: RunDirectory) -> None:
    life = Life(run, Clock())
    assert life.do(life.take_all()) == NUM_ROWS
    assert life.ledger.next_claim() is NoClaim.DONE
    assert Life(run, Clock()).ledger.next_claim() is NoClaim.DONE
    assert not life.ledger.live_claims_exist()


def test_claims_of_a_writer_that_left_are_taken_over(run: RunDirectory) -> None:
    clock = Clock()
    first = Life(run, clock)
    claims = first.take_all()
    first.do(claims[:5])
    second = Life(run, clock)
    assert second.ledger.next_claim() is NoClaim.WAIT and second.ledger.live_claims_exist()
    assert first.ledger.requeue_wanted(first.segments.num_committed)
    first.writer.leave()
    taken = second.take_all()
    assert {claim.number for claim in taken} == {claim.number for claim in claims[5:]}
    assert {claim.generation for claim in taken} == {1}
    assert second.do(taken) == NUM_ROWS - sum(claim.stop - claim.start for claim in claims[:5])
    assert second.ledger.next_claim() is NoClaim.DONE
    assert not second.ledger.requeue_wanted(1)


def test_partial_rows_go_on_where_they_ended(run: RunDirectory) -> None:
    clock = Clock()
    first = Life(run, clock)
    claims = first.take_all()
    begun = [stub_generation(claims[0].start, partial=True)]
    first.segments.add(begun)
    first.segments.close()
    first.writer.leave()
    second = Life(run, clock)
    found = {row: earlier for claim in second.take_all() for row, _, earlier in second.ledger.remaining(claim)}
    assert len(found) == NUM_ROWS
    assert [row for row, earlier in found.items() if earlier is not None] == [begun[0].row]
    assert np.array_equal(found[begun[0].row].token_ids, begun[0].token_ids)


def test_silent_writers_come_last_and_by_the_counter_alone(run: RunDirectory) -> None:
    clock = Clock()
    slow = Life(run, clock)
    held = slow.ledger.next_claim()
    slow.writer.step_finished()
    other = Life(run, clock)
    other.do(other.take_all())
    assert other.ledger.next_claim() is NoClaim.WAIT
    for _ in range(5):
        clock.now += 90
        slow.writer.step_finished()
        assert other.ledger.next_claim() is NoClaim.WAIT
    clock.now += 90
    slow.writer.set_state("running")  # A new file, the same counter.
    assert other.ledger.next_claim() is NoClaim.WAIT
    clock.now += 11
    claim = other.ledger.next_claim()
    assert isinstance(claim, Claim) and (claim.number, claim.generation) == (held.number, 1)


def test_a_claim_without_an_owner_falls_silent(run: RunDirectory) -> None:
    """Killed between creating the claim file and writing it."""
    (run.claims / "3.0").touch()
    (run.claims / "4.0").write_text("0123")
    clock = Clock()
    life = Life(run, clock)
    life.do(life.take_all())
    assert life.ledger.next_claim() is NoClaim.WAIT
    clock.now = 101
    assert {life.ledger.next_claim().number, life.ledger.next_claim().number} == {3, 4}


def test_processes_of_this_machine_are_dead_at_once(run: RunDirectory) -> None:
    clock = Clock()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    here = WriterIdentity.of_this_process()
    start = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
    fields = {"boot_id": here.boot_id, "pid_namespace": here.pid_namespace, "pid": child.pid}
    writer = register_writer(run, WriterIdentity(**fields, pid_start=start))
    reused = register_writer(run, WriterIdentity(**fields, pid_start=start - 1))
    elsewhere = register_writer(run, WriterIdentity(**{**fields, "boot_id": "another"}, pid_start=start - 1))
    container = register_writer(run, WriterIdentity(**{**fields, "pid_namespace": "pid:[1]"}, pid_start=start - 1))

    def verdicts() -> list[Verdict]:
        liveness = Liveness(run, clock=clock)
        return [liveness.verdict(life.id) for life in (writer, reused, elsewhere, container)]

    assert verdicts() == [Verdict.LIVE, Verdict.DEAD, Verdict.LIVE, Verdict.LIVE]
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert verdicts()[0] is Verdict.DEAD, "a zombie is dead"
    child.communicate()
    assert verdicts() == [Verdict.DEAD, Verdict.DEAD, Verdict.LIVE, Verdict.LIVE]


def test_a_later_life_of_a_job_says_that_the_earlier_one_is_dead(run: RunDirectory) -> None:
    clock = Clock()
    old = register_writer(run, WriterIdentity(job="7", cluster="c", restart_count=0))
    other_cluster = register_writer(run, WriterIdentity(job="7", cluster="d", restart_count=0))
    liveness = Liveness(run, clock=clock)
    liveness.refresh()
    assert liveness.verdict(old.id) is Verdict.LIVE
    register_writer(run, WriterIdentity(job="7", cluster="c", restart_count=1))
    liveness.refresh()
    assert liveness.verdict(old.id) is Verdict.DEAD
    assert liveness.verdict(other_cluster.id) is Verdict.LIVE


def test_rows_appended_later_are_found(tmp_path: Path) -> None:
    run = create_or_open(tmp_path / "run", identity(NUM_ROWS - 3))
    clock = Clock()
    first = Life(run, clock, num_rows=NUM_ROWS - 3)
    first.do(first.take_all())
    first.writer.leave()
    second = Life(run, clock, num_rows=NUM_ROWS + 100)
    assert second.do(second.take_all()) == 103
    assert second.ledger.next_claim() is NoClaim.DONE


def test_rows_of_a_damaged_segment_are_run_again(run: RunDirectory) -> None:
    life = Life(run, Clock())
    claims = life.take_all()
    life.do(claims[:10])
    life.do(claims[10:])
    assert life.ledger.next_claim(idle=True) is NoClaim.DONE
    damaged = sorted(run.segments.iterdir())[0]
    (run.segments / f"{damaged.name}.bad").touch()
    again = []
    while isinstance(claim := life.ledger.next_claim(idle=True), Claim):
        again.append(claim)
        life.do([claim])
    assert {claim.number for claim in again} == {claim.number for claim in claims[:10]}
    assert life.ledger.coverage.is_full


def test_requeue_rules(run: RunDirectory) -> None:
    clock = Clock()
    life = Life(run, clock)
    assert not life.ledger.requeue_wanted(0), "nothing committed: requeueing would go on for ever"
    assert life.ledger.requeue_wanted(1), "free claims"
    life.do(life.take_all())
    assert not life.ledger.requeue_wanted(NUM_ROWS)


def test_not_requeued_for_the_claims_of_live_writers(run: RunDirectory) -> None:
    clock = Clock()
    one, two = Life(run, clock), Life(run, clock)
    claim = one.ledger.next_claim()
    two.do(two.take_all())
    assert not two.ledger.requeue_wanted(5)
    one.do([claim])
    assert not two.ledger.requeue_wanted(5)


def test_the_folder_is_not_listed_for_every_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = create_or_open(tmp_path / "run", identity(64 * 2000))
    clock = Clock()
    lives = [Life(run, clock, num_rows=64 * 2000) for _ in range(4)]
    listings = []
    listdir = os.listdir
    monkeypatch.setattr(ledger_module.os, "listdir", lambda path: listings.append(path) or listdir(path))
    taken = 0
    while taken < 2000:
        taken += sum(isinstance(life.ledger.next_claim(), Claim) for life in lives)
    assert len(listings) < 200


def test_drawn_ids_never_meet(run: RunDirectory) -> None:
    draws = iter(["0" * 16, "0" * 16, "1" * 16])
    ids = [register_writer(run, WriterIdentity(), draw_id=lambda: next(draws)).id for _ in range(2)]
    assert ids == ["0" * 16, "1" * 16]
