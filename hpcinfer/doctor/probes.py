"""Small transfers between ranks, timed: what a link has, before a run depends on it.

Limited by: latency by the way of a message through library, NIC and switch; bandwidth by the slowest of memory, bus and link.
Of each the best of a few repetitions counts, so that other users of a node or a switch disturb little. Large transfers are
cut down where a link is so slow that they would take seconds.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from hpcinfer.comm.communicator import Communicator

SMALL_BYTES = 8 * 2**10
"""About what a decode step reduces for a sequence."""
MIDDLE_BYTES = 2**20
LARGE_BYTES = 16 * 2**20
"""About what a prefill step reduces."""
_SMALL_REPEATS = 20
_LARGE_REPEATS = 4
_BUDGET_S = 1.0
"""What the large transfers of one measurement may take."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReduceFigures:
    """An all-reduce over a group."""

    num_ranks: int
    latency_s: float
    """Of SMALL_BYTES."""
    bytes_per_s: float
    """What every rank sends in a large one, 2(n - 1)/n of its bytes, over the time."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PairFigures:
    """Transfers from this rank to another one."""

    peer: int
    """Number in the communicator."""
    latency_s: float
    """Half of the way of SMALL_BYTES there and back."""
    bytes_per_s: float
    """Of one large transfer to the peer."""


def measure_all_reduce(comm: Communicator) -> ReduceFigures:
    """Collective over `comm`, which has two ranks or more."""
    small = _empty(comm, SMALL_BYTES)
    latency_s = min(_timed(comm, lambda: comm.all_reduce(small)) for _ in range(_SMALL_REPEATS))
    middle = _empty(comm, MIDDLE_BYTES)
    elapsed_s = _agreed(comm, min(_timed(comm, lambda: comm.all_reduce(middle)) for _ in range(2)))
    num_bytes = _affordable(elapsed_s)
    if num_bytes > MIDDLE_BYTES:
        large = _empty(comm, num_bytes)
        elapsed_s = min(_timed(comm, lambda: comm.all_reduce(large)) for _ in range(_LARGE_REPEATS))
    return ReduceFigures(
        num_ranks=comm.size, latency_s=latency_s, bytes_per_s=2 * (comm.size - 1) / comm.size * num_bytes / elapsed_s
    )


def measure_pair(comm: Communicator, peer: int) -> PairFigures:
    """Both ranks of the pair call it, nobody else. First the lower rank sends, then the other."""
    first = comm.rank < peer
    latency_s = _round_trips(comm, peer, first)
    rates = [_send_rate(comm, peer, latency_s) if first == (turn == 0) else _receive(comm, peer) for turn in range(2)]
    return PairFigures(peer=peer, latency_s=latency_s, bytes_per_s=next(rate for rate in rates if rate is not None))


def pair_rounds(num_members: int, most_rounds: int) -> list[list[tuple[int, int]]]:
    """Pairs of members such that in each round everybody is in one pair at most, and no pair comes twice.

    The circle method of tournaments: one stands still, the others turn. In a few rounds everybody meets as many others.
    """
    seats = list(range(num_members)) + ([-1] if num_members % 2 else [])
    rounds = []
    for _ in range(min(len(seats) - 1, most_rounds)):
        pairs = zip(seats[: len(seats) // 2], reversed(seats[len(seats) // 2 :]), strict=True)
        rounds.append([(min(pair), max(pair)) for pair in pairs if -1 not in pair])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def _round_trips(comm: Communicator, peer: int, first: bool) -> float:
    tensor = _empty(comm, SMALL_BYTES)
    times = []
    for _ in range(_SMALL_REPEATS):
        began = time.perf_counter()
        for sends in (first, not first):
            (comm.send if sends else comm.recv)(tensor, peer).wait()
        _finish(comm)
        times.append(time.perf_counter() - began)
    return min(times) / 2


def _send_rate(comm: Communicator, peer: int, latency_s: float) -> float:
    """Bytes per second to `peer`, which runs `_receive`. What comes back is only an answer, and its time is taken off."""
    elapsed_s = min(_sent_and_answered(comm, peer, MIDDLE_BYTES) for _ in range(2))
    num_bytes = _affordable(elapsed_s)
    plan = torch.tensor([num_bytes], dtype=torch.int64, device=comm.device)
    comm.send(plan, peer).wait()
    if num_bytes > MIDDLE_BYTES:
        elapsed_s = min(_sent_and_answered(comm, peer, num_bytes) for _ in range(_LARGE_REPEATS))
    return num_bytes / max(elapsed_s - latency_s, 1e-9)


def _receive(comm: Communicator, peer: int) -> None:
    for _ in range(2):
        _received_and_answered(comm, peer, MIDDLE_BYTES)
    plan = torch.empty(1, dtype=torch.int64, device=comm.device)
    comm.recv(plan, peer).wait()
    num_bytes = int(plan.item())
    if num_bytes > MIDDLE_BYTES:
        for _ in range(_LARGE_REPEATS):
            _received_and_answered(comm, peer, num_bytes)


def _sent_and_answered(comm: Communicator, peer: int, num_bytes: int) -> float:
    tensor, answer = _empty(comm, num_bytes), _empty(comm, 4)
    _finish(comm)
    began = time.perf_counter()
    comm.send(tensor, peer).wait()
    comm.recv(answer, peer).wait()
    _finish(comm)
    return time.perf_counter() - began


def _received_and_answered(comm: Communicator, peer: int, num_bytes: int) -> None:
    comm.recv(_empty(comm, num_bytes), peer).wait()
    comm.send(_empty(comm, 4), peer).wait()
    _finish(comm)


def _affordable(middle_s: float) -> int:
    """Bytes of the large transfers, where MIDDLE_BYTES take so long; MIDDLE_BYTES where more would take too long."""
    large_s = middle_s * LARGE_BYTES / MIDDLE_BYTES
    return LARGE_BYTES if _LARGE_REPEATS * large_s <= _BUDGET_S else MIDDLE_BYTES


def _agreed(comm: Communicator, elapsed_s: float) -> float:
    """The longest time of all ranks: what they decide by it must be the same."""
    value = torch.tensor([elapsed_s], dtype=torch.float64, device=comm.device)
    return float(comm.all_reduce(value, "max").wait().item())


def _timed(comm: Communicator, issue: Callable) -> float:
    _finish(comm)
    began = time.perf_counter()
    issue().wait()
    _finish(comm)
    return time.perf_counter() - began


def _finish(comm: Communicator) -> None:
    """On a GPU waiting for a handle does not hold the host up."""
    if comm.device.type == "cuda":
        torch.cuda.synchronize(comm.device)


def _empty(comm: Communicator, num_bytes: int) -> torch.Tensor:
    return torch.zeros(num_bytes // 4, dtype=torch.float32, device=comm.device)
