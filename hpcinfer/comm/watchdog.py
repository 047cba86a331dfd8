"""The thread of a rank that finds what has got stuck, where nobody waits on the host with a deadline.

It asks every watched communicator for what is overdue or broken, looks at calls into libraries that may never return, and
exchanges heartbeats with two other ranks over MPI: each rank sends to the next one of the ring and listens to the one before,
so that the silence of any rank is noticed by one other, whatever both are doing. What it finds is handed to `on_failure`, which
reports and ends all ranks. Nothing here stops a communicator by itself: NCCL's abort waits for live graphs.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from hpcinfer.comm.operation import Mark
from hpcinfer.errors import CommunicationError, LostPeerError

PERIOD_S = 0.25
_FAREWELL = -2
"""In the place of the tick: the sender stops."""
_TAG = 7


class Watched(Protocol):
    """What the watchdog looks after: a communicator, or steps on a device."""

    def poll(self, now_s: float) -> CommunicationError | None:
        """What is wrong by now. Never blocks."""


class Watchdog:
    """Looks after communicators and other ranks. One a rank.

    Args:
        on_failure: called once, on the watchdog's thread, with what was found.
        deadline_s: how long a guarded call may take; another rank may be silent for twice as long.
        heart: heartbeats with other ranks; None for a single rank.
    """

    def __init__(
        self, on_failure: Callable[[CommunicationError], None], *, deadline_s: float, heart: Heart | None = None
    ) -> None:
        self.deadline_s = deadline_s
        self._on_failure = on_failure
        self._heart = heart
        self._watched: list[Watched] = []
        self._guarded: dict[int, tuple[str, float]] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hpcinfer-watchdog", daemon=True)
        self._thread.start()

    def watch(self, watched: Watched) -> None:
        """Look after it from now on."""
        self._watched = [*self._watched, watched]

    def forget(self, watched: Watched) -> None:
        """Look after it no longer."""
        self._watched = [each for each in self._watched if each is not watched]

    @contextlib.contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """A call inside the block that does not return within the deadline is a failure; `what` says what it was."""
        key = id(object())
        self._guarded[key] = (what, time.perf_counter())
        try:
            yield
        finally:
            del self._guarded[key]

    def close(self) -> None:
        """End the thread; with heartbeats collective over the world."""
        self._closing.set()
        self._thread.join()
        if self._heart is not None:
            self._heart.part(self.deadline_s)

    def _run(self) -> None:
        while not self._closing.wait(PERIOD_S):
            error = self._look(time.perf_counter())
            if error is not None:
                self._on_failure(error)
                return

    def _look(self, now_s: float) -> CommunicationError | None:
        for watched in self._watched:
            if (error := watched.poll(now_s)) is not None:
                return error
        for what, since_s in list(self._guarded.values()):
            if now_s - since_s > self.deadline_s:
                return LostPeerError(
                    f"{what} did not return within {self.deadline_s:g} s",
                    found=f"called {now_s - since_s:.1f} s ago",
                    fix="one of the ranks that take part has died or is stuck: look at their logs",
                )
        # Whoever waits for a silent rank in a transfer can say more, and is first.
        return None if self._heart is None else self._heart.beat(now_s, 2 * self.deadline_s)


class Heart:
    """Heartbeats over an MPI communicator that nothing else uses.

    Args:
        mpi_comm: an mpi4py communicator of at least two ranks; `part` frees it.
        hosts: of its ranks.
        mark: what this rank is working on; its tick travels along.
        period_s: between two beats.
    """

    def __init__(self, mpi_comm: Any, *, hosts: list[str], mark: Mark, period_s: float) -> None:
        self._comm = mpi_comm
        self._mark = mark
        self._period_s = period_s
        size, rank = mpi_comm.Get_size(), mpi_comm.Get_rank()
        self._next, self._previous = (rank + 1) % size, (rank - 1) % size
        self._previous_host = hosts[self._previous]
        self._sending: Any = None
        self._sent_s = 0.0
        self._outgoing = np.zeros(1, np.int64)
        self._heard_s = time.perf_counter()
        self._last_tick = -1
        self._is_gone = False

    def beat(self, now_s: float, limit_s: float) -> CommunicationError | None:
        """Send when it is time, take what has come, and say if the rank before is silent for longer than `limit_s`."""
        if now_s - self._sent_s >= self._period_s:
            self._send(self._mark.tick, now_s)
        self._listen(now_s)
        if self._is_gone or now_s - self._heard_s <= limit_s:
            return None
        where = f"rank {self._previous} on host {self._previous_host}"
        at = f"at tick {self._last_tick}" if self._last_tick >= 0 else "before its first tick"
        return LostPeerError(
            f"{where} has been silent for {now_s - self._heard_s:.1f} s; it should send a heartbeat every {self._period_s:g} s",
            found=f"last heard {at}",
            fix="its process is stopped, its node has died or the network between has: look at that host, then start again",
        )

    def part(self, deadline_s: float) -> None:
        """Say farewell, and take everything that the rank before has sent up to its own. Collective."""
        now_s = time.perf_counter()
        end_s = now_s + deadline_s
        self._send(_FAREWELL, now_s, wait_s=deadline_s)
        while not self._is_gone and time.perf_counter() < end_s:
            self._listen(time.perf_counter())
            time.sleep(0.001)
        if self._is_gone and (self._sending is None or self._sending.Test()):
            self._comm.Free()

    def _send(self, tick: int, now_s: float, *, wait_s: float = 0.0) -> None:
        """One message at a time: a rank that is stopped takes none, and they must not pile up."""
        end_s = now_s + wait_s
        while self._sending is not None and not self._sending.Test():
            if time.perf_counter() >= end_s:
                return
            time.sleep(0.001)
        self._outgoing = np.array([tick], np.int64)
        self._sending = self._comm.Isend(self._outgoing, self._next, _TAG)
        self._sent_s = now_s

    def _listen(self, now_s: float) -> None:
        incoming = np.empty(1, np.int64)
        while not self._is_gone and self._comm.Iprobe(source=self._previous, tag=_TAG):
            self._comm.Recv(incoming, self._previous, _TAG)
            self._heard_s = now_s
            self._is_gone = incoming[0] == _FAREWELL
            self._last_tick = max(self._last_tick, int(incoming[0]))
