"""The communicator over MPI, for tensors in host memory. Every CPU run and every CI test of a parallel layout uses it.

Strict mode imitates NCCL: one operation at a time per communicator, in issue order, with sends that complete only when
their receive has been posted. A program that would deadlock on NCCL then deadlocks here, and hits its deadline.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from hpcinfer.comm.communicator import Communicator, Handle
from hpcinfer.comm.mpi_library import load_mpi
from hpcinfer.comm.operation import MpiOperation, OperationQueue
from hpcinfer.comm.progress import ProgressEngine
from hpcinfer.errors import CommunicationError

HALF_DTYPES = (torch.bfloat16, torch.float16)
COMBINE = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}
EXCHANGE_TAG = 1
"""Tag of exchanges inside a collective; sends and receives of callers have tag 0."""
DEADLINE_S = 300.0


class MpiHandle(Handle):
    """An MPI operation in flight, what its result is, and what is left to do when it is over."""

    __slots__ = ("_communicator", "_finish", "_operation", "_result", "label")

    def __init__(
        self,
        communicator: MpiCommunicator,
        operation: MpiOperation,
        result: torch.Tensor | None,
        finish: Callable[[], None] | None,
    ) -> None:
        self._communicator = communicator
        self._operation = operation
        self._result = result
        self._finish = finish
        self.label = operation.label

    def wait(self) -> torch.Tensor | None:
        self._communicator._wait(self._operation)
        if self._finish is not None:
            # On the caller's thread, because inference mode is a property of the thread.
            with torch.inference_mode():
                self._finish()
            self._finish = None
        return self._result

    def done(self) -> bool:
        if not self._operation.finished and self._operation.issued_s:
            self._communicator.progress.poll()
        return self._operation.finished


class MpiCommunicator(Communicator):
    """Transfers of host tensors among the ranks of an MPI communicator.

    bfloat16 and float16 travel as 16-bit integers; where they are reduced they are widened to float32 and rounded once
    (MPICH refuses to sum bfloat16 and Open MPI silently returns inf).

    Args:
        mpi_comm: an mpi4py communicator that nothing else uses; `close()` frees it.
        name: for records and errors.
        progress: this rank's engine.
        strict: imitate NCCL's ordering (see above).
        deadline_s: seconds that any wait may last.
        world_ranks: of its members in their order, for errors.
    """

    def __init__(
        self,
        mpi_comm: Any,
        name: str,
        *,
        progress: ProgressEngine,
        strict: bool = False,
        deadline_s: float = DEADLINE_S,
        world_ranks: Sequence[int] = (),
    ) -> None:
        super().__init__(name, rank=mpi_comm.Get_rank(), size=mpi_comm.Get_size(), device=torch.device("cpu"))
        MPI = load_mpi()
        mpi_comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.progress = progress
        self.strict = strict
        self.deadline_s = deadline_s
        self._comm = mpi_comm
        self._in_place = MPI.IN_PLACE
        self._make_status = MPI.Status
        self._reductions = {"sum": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN}
        self._types = {
            np.dtype(np.float32): MPI.FLOAT, np.dtype(np.float64): MPI.DOUBLE, np.dtype(np.uint16): MPI.UINT16_T,
            np.dtype(np.int64): MPI.INT64_T, np.dtype(np.int32): MPI.INT32_T, np.dtype(np.uint8): MPI.UINT8_T,
        }
        self._queue = OperationQueue(
            name, self.rank, self.size, self.counters, strict=strict, world_ranks=world_ranks
        )
        self._group: list[MpiOperation] | None = None

    # -- verbs --------------------------------------------------------------------------------------------------------

    def _all_reduce(self, tensor: torch.Tensor, op: str, label: str) -> Handle:
        if self.size == 2 and tensor.dtype in HALF_DTYPES:
            return self._all_reduce_by_exchange(tensor, op, label)
        work, finish = self._widened(tensor)
        buffer = self._buffer(work)
        comm, in_place, reduction = self._comm, self._in_place, self._reductions[op]
        return self._issue(
            "all_reduce", tensor, lambda: [comm.Iallreduce(in_place, buffer, reduction)],
            buffers=(work, buffer), label=label, result=tensor, finish=finish,
        )

    def _all_reduce_by_exchange(self, tensor: torch.Tensor, op: str, label: str) -> Handle:
        """Two ranks swap their 16-bit tensors and add: half the bytes of the way through float32, and the same result,
        because torch adds 16-bit numbers in float32 and rounds once (FACTS: 0.27 ms instead of 1.23 ms a MB)."""
        received = torch.empty_like(tensor)
        mine, theirs = self._buffer(tensor), self._buffer(received)
        peer, comm = 1 - self.rank, self._comm
        combine = COMBINE[op]

        def finish() -> None:
            combine(tensor, received, out=tensor)

        return self._issue(
            "all_reduce", tensor,
            lambda: [comm.Irecv(theirs, peer, EXCHANGE_TAG), comm.Isend(mine, peer, EXCHANGE_TAG)],
            buffers=(tensor, received, mine, theirs), label=label, result=tensor, finish=finish,
        )

    def _all_gather(self, tensor: torch.Tensor, label: str) -> Handle:
        result = tensor.new_empty((self.size * tensor.shape[0], *tensor.shape[1:]))
        send, receive = self._buffer(tensor), self._buffer(result, count=tensor.numel())
        return self._issue(
            "all_gather", tensor, lambda: [self._comm.Iallgather(send, receive)],
            buffers=(tensor, result, send, receive), label=label, result=result,
        )

    def _reduce_scatter(self, tensor: torch.Tensor, label: str) -> Handle:
        result = tensor.new_empty((tensor.shape[0] // self.size, *tensor.shape[1:]))
        source, target, finish = tensor, result, None
        if tensor.dtype in HALF_DTYPES:
            source = tensor.float()
            target = source.new_empty(result.shape)
            finish = _copy(target, result)
        send, receive = self._buffer(source, count=target.numel()), self._buffer(target)
        reduction = self._reductions["sum"]
        return self._issue(
            "reduce_scatter", tensor, lambda: [self._comm.Ireduce_scatter_block(send, receive, reduction)],
            buffers=(source, target, send, receive), label=label, result=result, finish=finish,
        )

    def _broadcast(self, tensor: torch.Tensor, root: int, label: str) -> Handle:
        buffer = self._buffer(tensor)
        return self._issue(
            "broadcast", tensor, lambda: [self._comm.Ibcast(buffer, root)],
            buffers=(tensor, buffer), peer=root, label=label, result=tensor,
        )

    def _all_to_all(
        self, tensor: torch.Tensor, send_counts: list[int], recv_counts: list[int], label: str
    ) -> Handle:
        result = tensor.new_empty((sum(recv_counts), *tensor.shape[1:]))
        row = math.prod(tensor.shape[1:])
        send, receive = _rows(self._buffer(tensor), send_counts, row), _rows(self._buffer(result), recv_counts, row)
        return self._issue(
            "all_to_all", tensor, lambda: [self._comm.Ialltoallv(send, receive)],
            buffers=(tensor, result, send, receive), label=label, result=result,
        )

    def _send(self, tensor: torch.Tensor, peer: int, label: str) -> Handle:
        self._check_other(peer, "send")
        buffer = self._buffer(tensor)
        start = self._comm.Issend if self.strict else self._comm.Isend
        return self._issue(
            "send", tensor, lambda: [start(buffer, peer)], buffers=(tensor, buffer), peer=peer, label=label
        )

    def _recv(self, tensor: torch.Tensor, peer: int, label: str) -> Handle:
        self._check_other(peer, "recv")
        buffer = self._buffer(tensor)
        status = self._make_status()
        wanted = tensor.nbytes

        def finish() -> None:
            # MPI takes a shorter message without a word, and the rest of the tensor would be garbage.
            if (got := status.Get_count()) != wanted:
                raise self._misuse("recv", f"{got} bytes from rank {peer}", f"a tensor of the sender's {got} bytes")

        return self._issue(
            "recv", tensor, lambda: [self._comm.Irecv(buffer, peer)],
            buffers=(tensor, buffer), peer=peer, label=label, result=tensor, finish=finish, status=status,
        )

    def barrier(self) -> None:
        if self._group is not None:
            raise CommunicationError(f"barrier inside a group of communicator {self.name!r}", fix="end the group first")
        operation = MpiOperation(self._queue, "barrier", 0, lambda: [self._comm.Ibarrier()])
        self.progress.submit(self._queue, [operation])
        self._wait(operation)

    @contextlib.contextmanager
    def group(self) -> Iterator[None]:
        if self._group is not None:
            raise CommunicationError(f"group inside a group of communicator {self.name!r}", fix="end the first one")
        self._group = collected = []
        try:
            yield
        finally:
            self._group = None
        if collected:
            self.progress.submit(self._queue, collected)

    # -- life ---------------------------------------------------------------------------------------------------------

    def warmup(self, *, link: bool = False) -> None:
        """Exchange a byte with every other rank, so that no later transfer has to connect. Collective."""
        ones = [1] * self.size
        self.all_to_all(torch.zeros(self.size, dtype=torch.uint8), ones, ones, label="warmup").wait()
        self.barrier()

    def check(self) -> None:
        self.progress.poll()
        if self._queue.failure is not None:
            raise self._queue.failure

    def abort(self) -> None:
        self.progress.abandon(self._queue, CommunicationError(f"communicator {self.name!r} was aborted"))

    def close(self) -> None:
        if self._comm is None:
            return
        if self._queue.failure is None:
            self.progress.finish(self._queue, self.deadline_s)
            self._comm.Free()
        self._comm = None

    # -- inside -------------------------------------------------------------------------------------------------------

    def _issue(
        self,
        verb: str,
        tensor: torch.Tensor,
        start: Callable[[], list[Any]],
        *,
        buffers: tuple,
        result: torch.Tensor | None = None,
        finish: Callable[[], None] | None = None,
        peer: int | None = None,
        label: str = "",
        status: Any = None,
    ) -> Handle:
        operation = MpiOperation(
            self._queue, verb, tensor.nbytes, start, buffers=buffers, peer=peer, label=label, status=status,
            dtype=tensor.dtype, shape=tensor.shape,
        )
        if self._group is not None:
            self._group.append(operation)
        else:
            self.progress.submit(self._queue, [operation])
        return MpiHandle(self, operation, result, finish)

    def _wait(self, operation: MpiOperation) -> None:
        if not operation.issued_s:
            raise CommunicationError(
                f"wait for {operation.verb} on communicator {self.name!r} before its group has ended",
                fix="wait after the `with group():` block",
            )
        self.progress.wait(operation, self.deadline_s)

    def _check_other(self, peer: int, verb: str) -> None:
        if peer == self.rank:
            raise self._misuse(verb, f"rank {peer}, which is this rank", "another rank")

    def _widened(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None] | None]:
        """The tensor that MPI reduces in place, and how its value gets back into `tensor`."""
        if tensor.dtype not in HALF_DTYPES:
            return tensor, None
        wide = tensor.float()
        return wide, _copy(wide, tensor)

    def _buffer(self, tensor: torch.Tensor, count: int | None = None) -> list[Any]:
        """mpi4py's [array, count, datatype] over the memory of `tensor`."""
        tensor = tensor.detach()
        array = (tensor.view(torch.uint16) if tensor.dtype in HALF_DTYPES else tensor).numpy().reshape(-1)
        return [array, array.size if count is None else count, self._types[array.dtype]]


def _copy(source: torch.Tensor, target: torch.Tensor) -> Callable[[], None]:
    def copy() -> None:
        target.copy_(source)

    return copy


def _rows(buffer: list[Any], counts: list[int], row: int) -> list[Any]:
    """mpi4py's [array, (counts, displacements), datatype], in elements, from counts of rows of `row` elements."""
    sizes = [count * row for count in counts]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [buffer[0], (sizes, starts), buffer[2]]
