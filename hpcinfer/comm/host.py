"""The control plane: small Python objects among ranks. It stays on MPI even where tensors travel over NCCL."""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from hpcinfer.comm.communicator import Counters
from hpcinfer.comm.mpi_library import load_mpi
from hpcinfer.comm.operation import MpiOperation, OperationQueue
from hpcinfer.comm.progress import ProgressEngine
from hpcinfer.errors import CommunicationError

PACKET_BYTES = 8192
"""Size of the first packet of a broadcast: [length, int64 | payload]. A second one is sent only for a longer object."""
HEADER_BYTES = 8
ROOM_BYTES = PACKET_BYTES - HEADER_BYTES
PICKLE_PROTOCOL = 5


class Expected(ABC):
    """An object that another rank is going to broadcast."""

    @abstractmethod
    def done(self) -> bool:
        """True when the object, or its beginning, has come. Never blocks."""

    @abstractmethod
    def wait(self) -> Any:
        """The object. Call it once, before the next collective of the channel but `expect` is called.

        Raises:
            CommunicationError: the root did not send within the deadline.
        """


class HostChannel(ABC):
    """Objects among `size` ranks; this one is `rank`. Every method is collective over them and blocks.

    Objects are pickled, so they travel among the ranks of one run only, which all execute the same code. Use them for a
    few kilobytes; bulk data goes through a `Communicator`. `deadline_s` of a call replaces the channel's own deadline
    where one rank is known to be slow (loading, tokenising).
    """

    def __init__(self, name: str, rank: int, size: int) -> None:
        self.name = name
        self.rank = rank
        self.size = size
        self.counters = Counters()

    @abstractmethod
    def broadcast(self, obj: Any = None, root: int = 0, *, deadline_s: float | None = None) -> Any:
        """Rank `root`'s `obj`, on every rank. The root may return before the others have taken part.

        Raises:
            CommunicationError: the root did not send within the deadline.
        """

    @abstractmethod
    def expect(self, root: int = 0, *, deadline_s: float | None = None) -> Expected:
        """Take part in a broadcast of another rank without waiting for it. Calls keep their order with all others."""

    @abstractmethod
    def gather(self, obj: Any, root: int = 0, *, deadline_s: float | None = None) -> list[Any] | None:
        """Every rank's `obj` in rank order on `root`; None on the others."""

    @abstractmethod
    def all_gather(self, obj: Any, *, deadline_s: float | None = None) -> list[Any]:
        """Every rank's `obj`, in rank order, on every rank."""

    @abstractmethod
    def barrier(self, *, deadline_s: float | None = None) -> None:
        """Return when all ranks have called it."""

    def close(self) -> None:
        """Release what the channel holds. Collective."""


class LocalHostChannel(HostChannel):
    """The channel of a single rank; it needs no MPI."""

    def __init__(self, name: str = "local") -> None:
        super().__init__(name, rank=0, size=1)

    def broadcast(self, obj: Any = None, root: int = 0, *, deadline_s: float | None = None) -> Any:
        return obj

    def expect(self, root: int = 0, *, deadline_s: float | None = None) -> Expected:
        raise CommunicationError(f"channel {self.name!r} of one rank expects an object", fix="there is nobody to send it")

    def gather(self, obj: Any, root: int = 0, *, deadline_s: float | None = None) -> list[Any] | None:
        return [obj]

    def all_gather(self, obj: Any, *, deadline_s: float | None = None) -> list[Any]:
        return [obj]

    def barrier(self, *, deadline_s: float | None = None) -> None:
        return None


class MpiHostChannel(HostChannel):
    """The channel over an MPI communicator that nothing else uses; `close()` frees it.

    Args:
        mpi_comm: an mpi4py communicator.
        name: for errors.
        progress: this rank's engine.
        deadline_s: seconds that a call may wait, unless it says otherwise.
        world_ranks: of its members in their order, for errors.
    """

    def __init__(
        self,
        mpi_comm: Any,
        name: str,
        *,
        progress: ProgressEngine,
        deadline_s: float = 300.0,
        world_ranks: Sequence[int] = (),
    ) -> None:
        super().__init__(name, rank=mpi_comm.Get_rank(), size=mpi_comm.Get_size())
        MPI = load_mpi()
        mpi_comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.progress = progress
        self.deadline_s = deadline_s
        self._comm = mpi_comm
        self._byte = MPI.BYTE
        self._int64 = MPI.INT64_T
        self._queue = OperationQueue(name, self.rank, self.size, self.counters, world_ranks=world_ranks)

    def broadcast(self, obj: Any = None, root: int = 0, *, deadline_s: float | None = None) -> Any:
        if self.rank != root:
            return self.expect(root, deadline_s=deadline_s).wait()
        payload = pickle.dumps(obj, protocol=PICKLE_PROTOCOL)
        packet = bytearray(PACKET_BYTES)
        packet[:HEADER_BYTES] = len(payload).to_bytes(HEADER_BYTES, "little")
        packet[HEADER_BYTES : HEADER_BYTES + len(payload)] = payload[:ROOM_BYTES]
        self._finish(self._post_broadcast(packet, root), deadline_s)
        if len(payload) > ROOM_BYTES:
            self._finish(self._post_broadcast(bytearray(payload[ROOM_BYTES:]), root), deadline_s)
        return obj

    def expect(self, root: int = 0, *, deadline_s: float | None = None) -> Expected:
        return _MpiExpected(self, root, deadline_s)

    def gather(self, obj: Any, root: int = 0, *, deadline_s: float | None = None) -> list[Any] | None:
        payload, lengths = self._payload(obj)
        mine = lengths[self.rank : self.rank + 1].copy()
        target = [lengths, 1, self._int64] if self.rank == root else None
        self._run("gather", 8, lambda: self._comm.Igather([mine, 1, self._int64], target, root), deadline_s, root)
        whole, target = bytearray(), None
        if self.rank == root:
            whole, target = self._space(lengths)
        self._run(
            "gather", len(payload), lambda: self._comm.Igatherv([payload, self._byte], target, root), deadline_s, root
        )
        return _unpack(whole, lengths) if self.rank == root else None

    def all_gather(self, obj: Any, *, deadline_s: float | None = None) -> list[Any]:
        payload, lengths = self._payload(obj)
        mine = lengths[self.rank : self.rank + 1].copy()
        self._run(
            "all_gather", 8,
            lambda: self._comm.Iallgather([mine, 1, self._int64], [lengths, 1, self._int64]), deadline_s,
        )
        whole, target = self._space(lengths)
        self._run(
            "all_gather", len(payload), lambda: self._comm.Iallgatherv([payload, self._byte], target), deadline_s
        )
        return _unpack(whole, lengths)

    def barrier(self, *, deadline_s: float | None = None) -> None:
        self._run("barrier", 0, lambda: self._comm.Ibarrier(), deadline_s)

    def close(self) -> None:
        if self._comm is not None and self._queue.failure is None:
            self._comm.Free()
        self._comm = None

    def _run(
        self, verb: str, num_bytes: int, start: Any, deadline_s: float | None, root: int | None = None
    ) -> None:
        # The closure of `start` holds the buffers for as long as the operation lives.
        self._finish(self._post(verb, num_bytes, start, root), deadline_s)

    def _post_broadcast(self, buffer: bytearray, root: int) -> MpiOperation:
        return self._post("broadcast", len(buffer), lambda: self._comm.Ibcast([buffer, self._byte], root), root)

    def _post(self, verb: str, num_bytes: int, start: Any, root: int | None) -> MpiOperation:
        operation = MpiOperation(self._queue, verb, num_bytes, lambda: [start()], peer=root)
        self.progress.submit(self._queue, [operation])
        return operation

    def _finish(self, operation: MpiOperation, deadline_s: float | None) -> None:
        self.progress.wait(operation, self.deadline_s if deadline_s is None else deadline_s)

    def _payload(self, obj: Any) -> tuple[bytes, np.ndarray]:
        payload = pickle.dumps(obj, protocol=PICKLE_PROTOCOL)
        lengths = np.zeros(self.size, np.int64)
        lengths[self.rank] = len(payload)
        return payload, lengths

    def _space(self, lengths: np.ndarray) -> tuple[bytearray, list[Any]]:
        starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
        whole = bytearray(int(lengths.sum()))
        return whole, [whole, (lengths.tolist(), starts.tolist()), self._byte]


class _MpiExpected(Expected):
    """The receiving side of a broadcast, with its first packet posted."""

    def __init__(self, channel: MpiHostChannel, root: int, deadline_s: float | None) -> None:
        self._channel = channel
        self._root = root
        self._deadline_s = deadline_s
        self._packet = bytearray(PACKET_BYTES)
        self._operation = channel._post_broadcast(self._packet, root)

    def done(self) -> bool:
        if not self._operation.finished:
            self._channel.progress.poll()
        return self._operation.finished

    def wait(self) -> Any:
        self._channel._finish(self._operation, self._deadline_s)
        length = int.from_bytes(self._packet[:HEADER_BYTES], "little")
        rest = bytearray(max(0, length - ROOM_BYTES))
        if rest:
            self._channel._finish(self._channel._post_broadcast(rest, self._root), self._deadline_s)
        return pickle.loads(bytes(self._packet[HEADER_BYTES : HEADER_BYTES + min(length, ROOM_BYTES)]) + bytes(rest))


def _unpack(whole: bytearray, lengths: np.ndarray) -> list[Any]:
    ends = np.cumsum(lengths)
    view = memoryview(whole)
    return [pickle.loads(view[end - length : end]) for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)]
