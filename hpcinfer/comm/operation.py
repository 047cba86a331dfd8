"""An MPI operation from its issue to its end, and the queue of its communicator. They do nothing by themselves: see
`comm.progress`.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

from hpcinfer.errors import CommunicationError


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
    """One operation in flight: what it is, how to start it, and its MPI requests once started.

    Args:
        queue: the communicator or channel that it belongs to.
        verb: name of the operation, for records and errors.
        num_bytes: bytes of the caller's tensor.
        start: called once, under the engine's lock; issues the MPI calls and returns their requests.
        buffers: everything that MPI reads or writes; held here until the operation is over, because mpi4py does not
            keep the buffers of every collective alive.
        peer: the other rank of a send or recv, the root of a broadcast, None where all ranks take part.
        label: what the caller calls this transfer ("layer 3 mlp").
        dtype, shape: of the caller's tensor, for records.
    """

    __slots__ = (
        "queue", "verb", "num_bytes", "start", "buffers", "peer", "label", "requests", "status",
        "issued_s", "started_s", "ended_s", "finished", "error", "dtype", "shape", "tick", "part", "number",
    )

    def __init__(
        self,
        queue: OperationQueue,
        verb: str,
        num_bytes: int,
        start: Callable[[], Sequence[Any]],
        *,
        buffers: Any = None,
        peer: int | None = None,
        label: str = "",
        status: Any = None,
        dtype: Any = None,
        shape: Sequence[int] = (),
    ) -> None:
        self.queue = queue
        self.verb = verb
        self.num_bytes = num_bytes
        self.start = start
        self.buffers = buffers
        self.peer = peer
        self.label = label
        self.status = status
        self.dtype = dtype
        self.shape = shape
        self.tick = self.part = -1
        self.number = 0
        self.requests: list[Any] | None = None
        self.issued_s = 0.0
        self.started_s = 0.0
        self.ended_s = 0.0
        self.finished = False
        self.error: CommunicationError | None = None

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
