"""Drain signals of a replica's other ranks, told to its leader over MPI.

A signal may reach any one rank. The watchdog's thread of that rank sees it and sends two numbers to the leader, whose own thread
takes them and sets the leader's flag: within a fraction of a second, whatever the ranks are doing, and without anybody waiting.
What follows from it the leader decides between two ticks, and says in the message of the next one.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from hpcinfer.errors import LostPeerError
from hpcinfer.launch.signals import DrainFlag

_TAG = 11
_FAREWELL = (0, 0)
"""In the place of a signal: this rank sends no more."""


class DrainNotices:
    """One a rank; a `comm.watchdog.Watched`.

    Args:
        mpi_comm: an mpi4py communicator that nothing else uses; `close` frees it.
        leader: rank of this replica's leader in it.
        followers: the replica's other ranks.
        flag: of this rank: what signals it got, or, on the leader, where those of the others are noted.
    """

    def __init__(self, mpi_comm: Any, *, leader: int, followers: Sequence[int], flag: DrainFlag) -> None:
        self._comm = mpi_comm
        self._leader = leader
        self._flag = flag
        self._is_leader = mpi_comm.Get_rank() == leader
        self._talking = set(followers) if self._is_leader else set()
        self._lock = threading.Lock()  # `close` may come while the watchdog polls
        self._sent = (0, 0)
        self._is_parting = False
        self._sending: Any = None
        self._outgoing = np.zeros(2, np.int64)

    def poll(self, now_s: float) -> None:
        """Tell what is new, or take what has come. Never blocks."""
        with self._lock:
            if self._comm is None:
                return
            if self._is_leader:
                self._take()
            else:
                self._tell((self._flag.signal_number, int(self._flag.is_repeated)))

    def close(self, deadline_s: float) -> None:
        """Part: everything that was sent is taken. Collective.

        Raises:
            LostPeerError: another rank did not get there within the deadline.
        """
        end_s = time.monotonic() + deadline_s
        with self._lock:
            while not self._part():
                if time.monotonic() > end_s:
                    raise LostPeerError(
                        f"ranks did not part within {deadline_s:g} s",
                        found=f"waiting for {sorted(self._talking) or [self._leader]}", fix="look at the logs of those ranks",
                    )
                time.sleep(0.001)
            self._comm.Free()
            self._comm = None

    def _part(self) -> bool:
        """One look; True when nothing is left to send or to take."""
        if self._is_leader:
            self._take()
            return not self._talking
        if self._sending is not None and not self._sending.Test():
            return False
        if self._is_parting:
            return True
        self._is_parting = True
        self._send(_FAREWELL)
        return False

    def _tell(self, signals: tuple[int, int]) -> None:
        # One message at a time: a leader that is stopped takes none, and they must not pile up.
        if signals != self._sent and (self._sending is None or self._sending.Test()):
            self._send(signals)

    def _send(self, numbers: tuple[int, int]) -> None:
        self._outgoing = np.array(numbers, np.int64)
        self._sending = self._comm.Isend(self._outgoing, self._leader, _TAG)
        self._sent = numbers

    def _take(self) -> None:
        incoming = np.empty(2, np.int64)
        for rank in sorted(self._talking):
            while rank in self._talking and self._comm.Iprobe(source=rank, tag=_TAG):
                self._comm.Recv(incoming, rank, _TAG)
                number, repeated = incoming.tolist()
                if (number, repeated) == _FAREWELL:
                    self._talking.discard(rank)
                else:
                    reason = f"{signal.Signals(number).name} to rank {rank}"
                    self._flag.ask(reason, urgent=number == signal.SIGTERM, repeated=bool(repeated))
