"""Signals of other ranks told to a leader: one message at a time, nothing left over at the end."""

from __future__ import annotations

import collections
import signal

import pytest

from hpcinfer.comm.drain_notices import DrainNotices
from hpcinfer.errors import CommunicationError
from hpcinfer.launch.signals import DrainFlag


class Request:
    def __init__(self, network: Network) -> None:
        self._network = network

    def Test(self) -> bool:
        return self._network.accepts


class Network:
    """What the ranks of a test have sent, and not taken yet."""

    def __init__(self) -> None:
        self.boxes: dict[tuple[int, int], collections.deque] = collections.defaultdict(collections.deque)
        self.accepts = True
        self.num_sent = 0


class Comm:
    """An MPI communicator as one rank sees it."""

    def __init__(self, network: Network, rank: int) -> None:
        self._network, self._rank, self.freed = network, rank, False

    def Get_rank(self) -> int:
        return self._rank

    def Isend(self, buffer, peer, tag) -> Request:
        self._network.boxes[self._rank, peer].append(buffer.copy())
        self._network.num_sent += 1
        return Request(self._network)

    def Iprobe(self, source, tag) -> bool:
        return bool(self._network.boxes[source, self._rank])

    def Recv(self, buffer, source, tag) -> None:
        buffer[:] = self._network.boxes[source, self._rank].popleft()

    def Free(self) -> None:
        self.freed = True


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def ranks():
    """Of a replica of the ranks 4, 5 and 6, rank 4 the leader: rank -> its side. And of all: network, clock, communicators."""
    network, clock = Network(), Clock()
    comms = {rank: Comm(network, rank) for rank in (4, 5, 6)}
    flags = {rank: DrainFlag(clock) for rank in comms}
    sides = {rank: DrainNotices(comms[rank], leader=4, followers=[5, 6], flag=flags[rank]) for rank in comms}
    return network, clock, comms, flags, sides


def poll(sides) -> None:
    for rank in (5, 6, 4):
        assert sides[rank].poll(0.0) is None


def send(flag: DrainFlag, number: int) -> None:
    flag.install()
    try:
        signal.raise_signal(number)
    finally:
        flag.uninstall()


def test_a_signal_to_one_rank_reaches_the_leaders_flag(ranks):
    network, _, _, flags, sides = ranks
    poll(sides)
    assert network.num_sent == 0 and not flags[4]
    send(flags[6], signal.SIGUSR1)
    poll(sides)
    assert (flags[4].reason, flags[4].is_urgent, flags[4].is_repeated) == ("SIGUSR1 to rank 6", False, False)
    assert not flags[5], "what follows is the leader's affair"
    poll(sides)
    assert network.num_sent == 1, "it is said once"


def test_a_second_signal_and_sigterm_are_told_too(ranks):
    network, clock, _, flags, sides = ranks
    send(flags[5], signal.SIGUSR1)
    poll(sides)
    clock.now_s = 5.0
    send(flags[5], signal.SIGTERM)
    poll(sides)
    assert flags[4].is_urgent and flags[4].is_repeated and flags[4].reason == "SIGUSR1 to rank 5"


def test_one_signal_to_all_ranks_is_not_a_second_one(ranks):
    _, clock, _, flags, sides = ranks
    for number, flag in enumerate(flags.values()):
        clock.now_s = 3.0 * number
        send(flag, signal.SIGUSR1)
    poll(sides)
    assert flags[4].reason == "SIGUSR1" and not flags[4].is_repeated


def test_messages_do_not_pile_up_at_a_leader_that_takes_none(ranks):
    network, clock, _, flags, sides = ranks
    network.accepts = False
    for number in range(3):
        clock.now_s = 2.0 * number
        send(flags[5], signal.SIGUSR1 if number < 2 else signal.SIGTERM)
        sides[5].poll(0.0)
    assert network.num_sent == 1
    network.accepts = True
    poll(sides)
    assert network.num_sent == 2 and flags[4].is_urgent and flags[4].is_repeated


def test_at_the_end_everything_is_taken(ranks):
    network, _, comms, flags, sides = ranks
    send(flags[5], signal.SIGUSR1)
    sides[5].poll(0.0)
    for rank in (5, 6, 4):
        sides[rank].close(deadline_s=1.0)
    assert not any(network.boxes.values()) and all(comm.freed for comm in comms.values())
    assert flags[4], "a notice that came late is no reason to hang, and is taken"
    sides[4].poll(0.0)  # the watchdog may look once more


def test_a_rank_that_does_not_part_is_named(ranks):
    _, _, comms, _, sides = ranks
    sides[5].close(deadline_s=1.0)
    with pytest.raises(CommunicationError, match=r"\[6\]"):
        sides[4].close(deadline_s=0.05)
    assert not comms[4].freed
