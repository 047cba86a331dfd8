"""The leader's loop on its own: what the other ranks hear from it while it has nothing for them to compute."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hpcinfer.data.ledger.claims import NoClaim
from hpcinfer.launch.signals import DrainFlag
from hpcinfer.observe.metrics import PhaseClock
from hpcinfer.request import FinishReason, Generation, Status
from hpcinfer.runner import replica_loop
from hpcinfer.runner.replica_loop import ReplicaLoop

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
    scheduler = SimpleNamespace(num_sequences=0)

    def __init__(self, time: FakeTime) -> None:
        self._time = time
        self.spoke_at = [time.monotonic()]

    def step(self, requests, *, drain=False):
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


def failed_row() -> Generation:
    return Generation(row=0, status=Status.FAILED, finish_reason=FinishReason.NONE, error="too long")


@pytest.mark.parametrize("failed", [0, 3], ids=["waits for other writers", "meets rows that cannot be run"])
def test_a_leader_without_work_is_not_silent(failed, monkeypatch):
    clock = FakeTime()
    monkeypatch.setattr(replica_loop, "time", clock)
    replica, segments = FakeReplica(clock), FakeSegments()
    writer = SimpleNamespace(set_state=lambda *_, **__: None, step_finished=lambda **_: None)
    loop = ReplicaLoop(
        replica=replica, feed=FakeFeed(failed, clock), ledger=SimpleNamespace(num_claimed_keys=0), segments=segments,
        writer=writer, tokenizer=None, max_sequences=4, linger_s=1000, deadline_s=DEADLINE_S, failed_before=0,
        max_failed=10**9, drain=DrainFlag(), clock=PhaseClock(), on_tick=lambda figures: None,
    )
    figures = loop.run()
    gaps = [later - earlier for earlier, later in zip(replica.spoke_at, replica.spoke_at[1:], strict=False)]
    assert LASTS_S / DEADLINE_S <= len(gaps) <= LASTS_S / DEADLINE_S * 4, "now and then, and not in every turn"
    assert max(gaps) < DEADLINE_S
    assert figures.failed == segments.num_failed and bool(figures.failed) == bool(failed)
