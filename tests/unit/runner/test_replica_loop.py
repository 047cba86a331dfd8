"""The leader's loop on its own: its drains, and what the other ranks hear from it while it has nothing for them to compute."""

from __future__ import annotations

from collections import Counter, deque
from types import SimpleNamespace

import numpy as np
import pytest

from hpcinfer.data.ledger.claims import NoClaim
from hpcinfer.data.ledger.writers import Leaving
from hpcinfer.errors import ConfigError, DataError, TooManyFailedRows
from hpcinfer.launch.signals import DrainFlag
from hpcinfer.observe.metrics import PhaseClock
from hpcinfer.request import FinishReason, Generation, Request, SamplingParams, Status
from hpcinfer.runner import replica_loop
from hpcinfer.runner.drain import DrainPlan
from hpcinfer.runner.replica_loop import ReplicaLoop
from hpcinfer.scheduler.limits import SchedulerCounters
from hpcinfer.scheduler.sequence import EndedSequence

DEADLINE_S = 20.0
LASTS_S = 100.0


class FakeTime:
    """Stands in for the module `time`: passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 5.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class FakeReplica:
    """Has no sequences; notes when it was stepped."""

    is_idle = True
    scheduler = SimpleNamespace(num_sequences=0, counters=SchedulerCounters())

    def __init__(self, time: FakeTime) -> None:
        self._time = time
        self.spoke_at = [time.monotonic()]

    def step(self, requests):
        assert not requests
        self.spoke_at.append(self._time.monotonic())
        return []


class FakeSegments:
    """Takes rows."""

    num_ok = num_failed = num_partial = 0

    def add(self, generations) -> None:
        self.num_failed += len(generations)

    def flush(self) -> None: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...


class FakeFeed:
    """For a while `failed` rows at a time that cannot be run (with 0: waits for other writers), then nothing more."""

    def __init__(self, failed: int, time: FakeTime) -> None:
        self._failed = failed
        self._time = time
        self._until = time.monotonic() + LASTS_S
        self.state = None

    def take(self, count, *, idle=False):
        self._time.sleep(0.5)
        if self._time.monotonic() > self._until:
            self.state = NoClaim.DONE
            return [], []
        self.state = None if self._failed else NoClaim.WAIT
        return [], [failed_row()] * self._failed

    def close(self) -> None: ...


def failed_row() -> Generation:
    return Generation(row=0, status=Status.FAILED, finish_reason=FinishReason.NONE, error="too long")


class WorkingReplica:
    """Computes `at_once` of its sequences at a time; a tick takes a second, a sequence as many as its row's number."""

    def __init__(self, time: FakeTime, at_once: int) -> None:
        self._time = time
        self._at_once = at_once
        self.sequences: list[list] = []
        """[request, ticks so far] of each, the ones in work first."""
        self.num_computed: Counter[int] = Counter()
        """Row -> ticks spent on it."""

    @property
    def is_idle(self) -> bool:
        return not self.sequences

    @property
    def scheduler(self) -> SimpleNamespace:
        return SimpleNamespace(num_sequences=len(self.sequences), counters=SchedulerCounters())

    def step(self, requests, *, give_back=False, drain=False):
        self.sequences += [[request, 0] for request in requests]
        kept = 0 if drain else sum(ticks > 0 for _, ticks in self.sequences) if give_back else len(self.sequences)
        ended = [self.end(request, ticks, FinishReason.NONE) for request, ticks in self.sequences[kept:]]
        del self.sequences[kept:]
        self._time.sleep(1.0)
        for sequence in self.sequences[: self._at_once]:
            sequence[1] += 1
            self.num_computed[sequence[0].row] += 1
        done = [(request, ticks) for request, ticks in self.sequences if ticks == request.row]
        self.sequences = [sequence for sequence in self.sequences if sequence[1] < sequence[0].row]
        return ended + [self.end(request, ticks, FinishReason.STOP) for request, ticks in done]

    def end(self, request, ticks, reason) -> EndedSequence:
        return EndedSequence(request=request, output_token_ids=np.arange(ticks, dtype=np.int32), reason=reason)


class Rows:
    """A feed of the rows 1, 2, 3 ...: `num_rows` of them."""

    def __init__(self, num_rows: int) -> None:
        self.left = deque(range(1, num_rows + 1))
        self.state = None

    def take(self, count, *, idle=False):
        taken = [self.left.popleft() for _ in range(min(count, len(self.left)))]
        self.state = None if self.left else NoClaim.DONE
        sampling = SamplingParams(max_tokens=100)
        return [Request(row=row, prompt_token_ids=np.array([1], np.int32), sampling=sampling) for row in taken], []

    def close(self) -> None: ...


class Kept(FakeSegments):
    """Rows by their status."""

    def __init__(self) -> None:
        self.rows: dict[Status, list[int]] = {status: [] for status in Status}

    def add(self, generations) -> None:
        for generation in generations:
            self.rows[generation.status].append(generation.row)
        self.num_ok, self.num_partial = len(self.rows[Status.OK]), len(self.rows[Status.PARTIAL])


class Life:
    """A loop over 20 rows, 4 of them in work at once. `at` says what happens when: second -> a call with the flag; `asked` who asks for
    a drain before it begins."""

    def __init__(self, monkeypatch, *, at=None, drain_s=None, left_s=None, num_rows=20, asked="") -> None:
        self.time = FakeTime()
        monkeypatch.setattr(replica_loop, "time", self.time)
        self.replica, self.segments, self.rows = WorkingReplica(self.time, 4), Kept(), Rows(num_rows)
        self.said: list[str] = []
        self.states: list[str] = []
        flag, begun, pending = DrainFlag(self.time.monotonic), self.time.now_s, dict(at or {})
        flag.ask(asked)

        def on_tick(figures) -> None:
            for second in [second for second in pending if self.time.now_s - begun >= second]:
                pending.pop(second)(flag)

        writer = SimpleNamespace(set_state=lambda state, **_: self.states.append(state), step_finished=lambda **_: None)
        self.loop = ReplicaLoop(
            replica=self.replica, feed=self.rows, ledger=SimpleNamespace(num_claimed_keys=0), segments=self.segments,
            writer=writer, tokenizer=None, max_sequences=4, linger_s=1000, deadline_s=DEADLINE_S, failed_before=0,
            max_failed=10**9, say=self.said.append, clock=PhaseClock(), on_tick=on_tick,
            drain=DrainPlan(flag, drain_s=drain_s, margin_s=2.0, left_s=left_s, clock=self.time.monotonic),
        )
        self.loop.run()
        self.seconds = self.time.now_s - begun
        self.ok, self.partial = self.segments.rows[Status.OK], self.segments.rows[Status.PARTIAL]
        self.untouched = set(range(1, num_rows + 1)) - set(self.ok) - set(self.partial)


def ask(**how):
    return lambda flag: flag.ask("SIGUSR1", **how)


def test_an_undisturbed_loop_ends_by_itself(monkeypatch):
    life = Life(monkeypatch)
    assert sorted(life.ok) == list(range(1, 21)) and life.loop.leaving is Leaving.DONE and not life.said
    assert "draining" not in life.states


def test_a_drain_lets_what_is_in_work_finish_and_computes_nothing_else(monkeypatch):
    life = Life(monkeypatch, at={8: ask()}, drain_s=100.0)
    assert not life.partial and life.loop.leaving is Leaving.DRAINED and life.states[-1] == "draining"
    assert life.replica.num_computed == {row: row for row in life.ok}, "time was spent on a row that did not finish"
    assert 5 <= len(life.ok) < 12
    assert life.said[0] == "SIGUSR1: no row is begun any more; 3 in work may go on for 1:39"
    assert life.said[1] == (
        f"drained by SIGUSR1: 3 rows finished, 0 cut short and kept as partial rows, {20 - len(life.ok)} given back before they had begun"
    )


def test_at_the_limit_the_rest_is_kept_as_partial_rows(monkeypatch):
    whole, life = Life(monkeypatch, at={8: ask()}, drain_s=100.0), Life(monkeypatch, at={8: ask()}, drain_s=2.0)
    assert life.seconds < whole.seconds
    assert life.partial and set(life.partial) < set(whole.ok)
    assert sorted(life.ok + life.partial) == sorted(whole.ok)
    assert f"{len(life.partial)} cut short" in life.said[1]


def test_without_time_all_that_is_in_work_is_cut_short_at_once(monkeypatch):
    life = Life(monkeypatch, at={8: ask()}, drain_s=0.0)
    assert len(life.partial) == 3 and len(life.said) == 1
    assert sum(life.replica.num_computed.values()) == 4 * 8, "no step but those before the signal"


def test_a_second_signal_ends_the_waiting(monkeypatch):
    life = Life(monkeypatch, at={8: ask(), 10: ask(repeated=True)}, drain_s=100.0)
    assert life.partial and life.seconds <= 12


def test_the_end_of_the_job_drains(monkeypatch):
    life = Life(monkeypatch, left_s=20.0)
    assert life.loop.leaving is Leaving.DRAINED and life.untouched and life.seconds <= 20 - 2 + 1
    assert "the end of the job's time" in life.said[0]


def test_a_drain_before_the_first_row_takes_none(monkeypatch):
    life = Life(monkeypatch, asked="SIGTERM")
    assert not life.ok and not life.partial and len(life.rows.left) == 20 and life.loop.leaving is Leaving.DRAINED


def test_reasons_are_counted_by_kind_and_take_bounded_memory():
    failures: Counter[str] = Counter()
    for number in range(5000):
        replica_loop.count_reason(failures, f"the prompt has {number} tokens")
        replica_loop.count_reason(failures, f"no text does {number * 'x'}")
    assert failures["the prompt has # tokens"] == 5000 and failures.total() == 10000
    assert len(failures) == 1001 and failures.most_common(2)[1][0].startswith("other reasons")


@pytest.mark.parametrize("error", [DataError, ConfigError, TooManyFailedRows])
def test_an_error_that_comes_with_the_rows_keeps_those_that_are_finished(error, monkeypatch):
    """Another start would meet it again: it must not find the same rows missing each time."""
    flushed_at = []
    monkeypatch.setattr(Kept, "flush", lambda self: flushed_at.append(self.num_ok))
    real = Rows.take

    def take(rows, count, *, idle=False):
        if len(rows.left) < 10:
            raise error("damaged")
        return real(rows, min(count, 2))

    monkeypatch.setattr(Rows, "take", take)
    with pytest.raises(error):
        Life(monkeypatch)
    assert flushed_at[-1] > 0


@pytest.mark.parametrize("failed", [0, 3], ids=["waits for other writers", "meets rows that cannot be run"])
def test_a_leader_without_work_is_not_silent(failed, monkeypatch):
    clock = FakeTime()
    monkeypatch.setattr(replica_loop, "time", clock)
    replica, segments = FakeReplica(clock), FakeSegments()
    writer = SimpleNamespace(set_state=lambda *_, **__: None, step_finished=lambda **_: None)
    loop = ReplicaLoop(
        replica=replica, feed=FakeFeed(failed, clock), ledger=SimpleNamespace(num_claimed_keys=0), segments=segments,
        writer=writer, tokenizer=None, max_sequences=4, linger_s=1000, deadline_s=DEADLINE_S, failed_before=0,
        max_failed=10**9, say=print, clock=PhaseClock(), on_tick=lambda figures: None,
        drain=DrainPlan(DrainFlag(), drain_s=None, margin_s=30.0, left_s=None),
    )
    figures = loop.run()
    gaps = [later - earlier for earlier, later in zip(replica.spoke_at, replica.spoke_at[1:], strict=False)]
    assert LASTS_S / DEADLINE_S <= len(gaps) <= LASTS_S / DEADLINE_S * 4, "now and then, and not in every turn"
    assert max(gaps) < DEADLINE_S
    assert figures.failed == segments.num_failed and bool(figures.failed) == bool(failed)


def test_without_rows_it_lingers_and_leaves(monkeypatch):
    """Others hold all that is left, and do not die."""
    life = Life(monkeypatch, num_rows=4)
    assert life.loop.leaving is Leaving.DONE
    clock = FakeTime()
    monkeypatch.setattr(replica_loop, "time", clock)
    states = []
    feed = FakeFeed(0, clock)
    feed.take = lambda count, *, idle=False: ([], [])
    feed.state = NoClaim.WAIT
    loop = ReplicaLoop(
        replica=FakeReplica(clock), feed=feed, ledger=SimpleNamespace(num_claimed_keys=0), segments=FakeSegments(),
        writer=SimpleNamespace(set_state=lambda state, **_: states.append(state), step_finished=lambda **_: None),
        tokenizer=None, max_sequences=4, linger_s=30.0, deadline_s=DEADLINE_S, failed_before=0, max_failed=10**9, say=print,
        clock=PhaseClock(), on_tick=lambda figures: None,
        drain=DrainPlan(DrainFlag(), drain_s=None, margin_s=30.0, left_s=None, clock=clock.monotonic),
    )
    began = clock.now_s
    loop.run()
    assert 30 < clock.now_s - began < 32 and loop.leaving is Leaving.NO_ROWS and states == ["running", "idle"]
