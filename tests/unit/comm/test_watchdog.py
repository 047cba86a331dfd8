"""The watchdog: what it finds, when, and that it ends."""

from __future__ import annotations

import threading
import time

import pytest

from hpcinfer.comm.operation import Mark
from hpcinfer.comm.watchdog import Heart, Watchdog
from hpcinfer.errors import CommunicationError


class Request:
    def __init__(self, done: bool) -> None:
        self.done = done

    def Test(self) -> bool:
        return self.done


class Wire:
    """An MPI communicator of three ranks, seen from rank 0: what it sends is kept, what arrives is put in by the test."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.arriving: list[int] = []
        self.accepts = True
        self.freed = False

    def Get_size(self) -> int:
        return 3

    def Get_rank(self) -> int:
        return 0

    def Isend(self, buffer, peer, tag) -> Request:
        assert peer == 1
        self.sent.append(int(buffer[0]))
        return Request(self.accepts)

    def Iprobe(self, source, tag) -> bool:
        assert source == 2
        return bool(self.arriving)

    def Recv(self, buffer, source, tag) -> None:
        buffer[0] = self.arriving.pop(0)

    def Free(self) -> None:
        self.freed = True


def make_heart(period_s: float = 1.0) -> tuple[Heart, Wire, Mark]:
    wire, mark = Wire(), Mark()
    return Heart(wire, hosts=["a", "b", "c"], mark=mark, period_s=period_s), wire, mark


def test_it_beats_in_its_period_and_says_the_tick():
    heart, wire, mark = make_heart()
    now = time.perf_counter() + 10
    mark.set(41)
    assert heart.beat(now, 100.0) is None
    heart.beat(now + 0.5, 100.0)
    assert wire.sent == [41]
    mark.set(42)
    heart.beat(now + 1.1, 100.0)
    assert wire.sent == [41, 42]


def test_beats_do_not_pile_up_before_a_rank_that_takes_none():
    heart, wire, _ = make_heart(period_s=0.0)
    wire.accepts = False
    for _ in range(5):
        heart.beat(time.perf_counter(), 100.0)
    assert len(wire.sent) == 1


def test_silence_names_rank_host_and_tick():
    heart, wire, _ = make_heart()
    now = time.perf_counter()
    wire.arriving = [3, 7]
    assert heart.beat(now, 5.0) is None
    assert heart.beat(now + 4.9, 5.0) is None
    text = str(heart.beat(now + 5.5, 5.0))
    for part in ("rank 2 on host c", "5.5 s", "tick 7"):
        assert part in text, text
    wire.arriving = [8]
    assert heart.beat(now + 6, 5.0) is None, "it lives after all"


def test_farewell_is_no_silence_and_frees_the_wire():
    heart, wire, _ = make_heart()
    wire.arriving = [5, -2]
    heart.part(1.0)
    assert wire.sent == [-2] and wire.freed
    assert heart.beat(time.perf_counter() + 1000, 1.0) is None


def test_without_the_others_farewell_it_leaves_at_its_deadline():
    heart, wire, _ = make_heart()
    began = time.monotonic()
    heart.part(0.2)
    assert 0.15 < time.monotonic() - began < 5 and not wire.freed


class Found:
    """Collects what a watchdog finds."""

    def __init__(self) -> None:
        self.errors: list[CommunicationError] = []
        self.came = threading.Event()

    def __call__(self, error: CommunicationError) -> None:
        self.errors.append(error)
        self.came.set()


class Watched:
    def __init__(self, error: CommunicationError | None = None) -> None:
        self.error = error

    def poll(self, now_s: float) -> CommunicationError | None:
        return self.error


def test_it_reports_once_what_a_communicator_says():
    found = Found()
    watchdog = Watchdog(found, deadline_s=60)
    fine, broken = Watched(), Watched(CommunicationError("all_reduce is stuck"))
    watchdog.watch(fine)
    watchdog.watch(broken)
    assert found.came.wait(5)
    time.sleep(0.6)
    watchdog.close()
    assert [str(error) for error in found.errors] == ["all_reduce is stuck"]


def test_it_looks_no_longer_at_what_it_was_told_to_forget():
    found = Found()
    watchdog = Watchdog(found, deadline_s=60)
    broken = Watched()
    watchdog.watch(broken)
    watchdog.forget(broken)
    broken.error = CommunicationError("late")
    time.sleep(0.6)
    watchdog.close()
    assert not found.errors


@pytest.mark.parametrize("slow", [True, False])
def test_a_call_that_does_not_return(slow):
    found = Found()
    watchdog = Watchdog(found, deadline_s=0.3)
    with watchdog.guard("ncclCommInitRank of 'tp'"):
        if slow:
            assert found.came.wait(5)
    time.sleep(0.7)
    watchdog.close()
    texts = [str(error) for error in found.errors]
    assert len(texts) == slow and all("ncclCommInitRank of 'tp' did not return within 0.3 s" in text for text in texts)
