"""An operation from its issue to its end, and the queue of its communicator. They do nothing by themselves: MPI's are driven
by `comm.progress`, NCCL's by the device.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

from hpcinfer.errors import CommunicationError, LostPeerError


class Mark:
    """What a rank is working on, set by those who know it and copied into every operation at its issue, so that reports
    and records can name the microbatch."""

    __slots__ = ("part", "tick")

    def __init__(self) -> None:
        self.set()

    def set(self, tick: int = -1, part: int = -1) -> None:
        """From now on this tick, and this microbatch of it; -1 for the step as a whole, and for nothing."""
        self.tick = tick
        self.part = part


class Operation:
    """One operation: what it is, and when it was issued, started and over.

    Args:
        queue: the communicator or channel that it belongs to.
        verb: name of the operation, for records and errors.
        num_bytes: bytes of the caller's tensor.
        buffers: everything that the transfer reads or writes; held here until the operation is over.
        peer: the other rank of a send or recv, the root of a broadcast, None where all ranks take part.
        label: what the caller calls this transfer ("layer 3 mlp").
        dtype, shape: of the caller's tensor, for records.
    """

    __slots__ = (
        "queue", "verb", "num_bytes", "buffers", "peer", "label", "dtype", "shape", "tick", "part", "number",
        "issued_s", "started_s", "ended_s", "finished", "error",
    )

    def __init__(
        self,
        queue: OperationQueue,
        verb: str,
        num_bytes: int,
        *,
        buffers: Any = None,
        peer: int | None = None,
        label: str = "",
        dtype: Any = None,
        shape: Sequence[int] = (),
    ) -> None:
        self.queue = queue
        self.verb = verb
        self.num_bytes = num_bytes
        self.buffers = buffers
        self.peer = peer
        self.label = label
        self.dtype = dtype
        self.shape = shape
        self.tick = self.part = -1
        self.number = 0
        self.issued_s = self.started_s = self.ended_s = 0.0
        self.finished = False
        self.error: CommunicationError | None = None

    def describe(self, world_rank: int, host: str) -> str:
        """What it is and where, for reports: verb, label, bytes, communicator, rank and host, peer, tick and microbatch."""
        queue = self.queue
        label = f" ({self.label})" if self.label else ""
        part = f" part {self.part}" if self.part >= 0 else ""
        microbatch = f", {'microbatch ' if part else ''}tick {self.tick}{part}" if self.tick >= 0 else ""
        return (
            f"{self.verb}{label} of {self.num_bytes} bytes by rank {queue.rank} of {queue.size} in "
            f"{queue.name!r} (world rank {world_rank}, host {host or 'unknown'}), {self._others()}{microbatch}"
        )

    def _others(self) -> str:
        """With whom: by the number in the communicator, and by that in the world, which says where to look."""
        world_ranks = self.queue.world_ranks
        if self.peer is None or self.peer == self.queue.rank:  # the root itself waits for all others
            return f"all ranks (world ranks {', '.join(map(str, world_ranks))})" if world_ranks else "all ranks"
        return f"peer {self.peer}" + (f" (world rank {world_ranks[self.peer]})" if world_ranks else "")


class MpiOperation(Operation):
    """An operation over MPI: how to start it, and its requests once started.

    Args:
        start: called once, under the engine's lock; issues the MPI calls and returns their requests.
        buffers: held because mpi4py does not keep the buffers of every collective alive.
        status: an MPI status that the last request fills.
    """

    __slots__ = ("start", "requests", "status")

    def __init__(
        self,
        queue: OperationQueue,
        verb: str,
        num_bytes: int,
        start: Callable[[], Sequence[Any]],
        *,
        status: Any = None,
        **facts: Any,
    ) -> None:
        super().__init__(queue, verb, num_bytes, **facts)
        self.start = start
        self.status = status
        self.requests: list[Any] | None = None

    def test(self) -> bool:
        """True when every request is complete. Under the engine's lock."""
        requests = self.requests
        while requests:
            if not requests[-1].Test(self.status):
                return False
            requests.pop()
        return True


class OperationQueue:
    """The operations of one communicator, in issue order.

    Args:
        name, rank, size: of the communicator, for errors.
        counters: a `Counters`; operations, bytes and waiting time are added to it.
        strict: start a batch only when the one before it is over (what a NCCL stream does).
        world_ranks: of its members in their order, for errors; empty where nobody knows.
    """

    def __init__(
        self,
        name: str,
        rank: int,
        size: int,
        counters: Any,
        *,
        strict: bool = False,
        world_ranks: Sequence[int] = (),
    ) -> None:
        self.name = name
        self.rank = rank
        self.size = size
        self.counters = counters
        self.strict = strict
        self.world_ranks = world_ranks
        self.batches: collections.deque[list[Operation]] = collections.deque()
        self.in_flight = 0
        self.failure: CommunicationError | None = None

    def issue(self, operation: Operation, now_s: float, mark: Mark) -> None:
        """Number and count an operation that is issued now, and note what it is for."""
        operation.issued_s = now_s
        operation.tick, operation.part = mark.tick, mark.part
        self.counters.operations += 1
        operation.number = self.counters.operations
        self.counters.bytes += operation.num_bytes


def overdue_error(operation: Operation, described: str, state: str, age_s: float, deadline_s: float) -> CommunicationError:
    """The report of an operation that is not over after its deadline.

    Args:
        described: what `Operation.describe` says.
        state: how far it got.
        age_s: how long it has been waited for.
    """
    return LostPeerError(
        f"{operation.verb} on communicator {operation.queue.name!r} did not finish within its deadline of {deadline_s:g} s",
        found=f"waited {age_s:.1f} s for {described}; {state}",
        fix="look at the other ranks of this communicator: one has died, is stuck, or issued its operations in "
        "another order; if it is only slow, raise the communication deadline",
    )
