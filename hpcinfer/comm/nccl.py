"""The communicator over NCCL, for tensors in the memory of GPUs, on CuPy's binding.

A transfer runs on the communicator's own stream (`comm.device_queue`), so `wait()` returns at once and a transfer that never
ends is found by the watchdog. CuPy passes addresses and counts to NCCL unchecked, so everything is checked here and in
`Communicator`.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

from hpcinfer.comm.communicator import Communicator, Handle
from hpcinfer.comm.device_queue import DeviceOperation, DeviceQueue, Launch, Reporting
from hpcinfer.comm.host import HostChannel
from hpcinfer.comm.nccl_library import Nccl
from hpcinfer.comm.nccl_memory import ReductionBuffers, can_register, reduction_memory
from hpcinfer.errors import CommunicationError

DTYPE_CODES = {
    torch.uint8: 1, torch.int32: 2, torch.int64: 4, torch.float16: 6, torch.float32: 7, torch.float64: 8, torch.bfloat16: 9,
}
"""ncclDataType_t."""
REDUCTION_CODES = {"sum": 0, "max": 2, "min": 3}
"""ncclRedOp_t."""
_WARMUP_BYTES = (1024, 1 << 20)
"""NCCL connects each algorithm and protocol at its first use, and chooses them by size."""


class NcclHandle(Handle):
    """An operation in flight and its result."""

    __slots__ = ("_communicator", "_operation", "_result", "_waited", "label")

    def __init__(self, communicator: NcclCommunicator, operation: DeviceOperation, result: torch.Tensor | None) -> None:
        self._communicator = communicator
        self._operation = operation
        self._result = result
        self._waited = False
        self.label = operation.label

    def wait(self) -> torch.Tensor | None:
        if not self._waited:
            self._communicator._wait(self._operation, self._result)
            self._waited = True
        return self._result

    def done(self) -> bool:
        return self._communicator._queue.is_over(self._operation)


class NcclCommunicator(Communicator):
    """Transfers of device tensors among the ranks of a host channel.

    Sums of bfloat16 and float16 are rounded as NCCL does it, at each addition; with two ranks that is once.

    Args:
        channel: among the same ranks in the same order; it carries NCCL's id and barriers, and is closed with this.
        name: for records and errors.
        device: of this rank, bound already.
        nccl: what the communicators of this rank share.
        reporting: of this rank.
        deadline_s: seconds after which an operation counts as stuck.
        world_ranks: of its members in their order, for errors.

    Raises:
        CommunicationError: NCCL refuses.
    """

    def __init__(
        self,
        channel: HostChannel,
        name: str,
        *,
        device: torch.device,
        nccl: Nccl,
        reporting: Reporting,
        deadline_s: float = 300.0,
        world_ranks: tuple[int, ...] = (),
    ) -> None:
        super().__init__(name, rank=channel.rank, size=channel.size, device=device)
        self._channel = channel
        self._library = nccl.library
        self._streams = nccl.streams
        self._watchdog = nccl.watchdog
        self._thread = threading.get_ident()
        self._queue = DeviceQueue(
            name, self.rank, self.size, self.counters, streams=nccl.streams, reporting=reporting, deadline_s=deadline_s,
            world_ranks=world_ranks,
        )
        self._group: list[tuple[DeviceOperation, Launch]] | None = None
        self._buffers: ReductionBuffers | None = None
        # Members that do not come are found by the watchdog: NCCL itself waits for them for ever.
        with self._watchdog.guard(f"making the NCCL communicator {name!r} of {self.size} ranks"):
            unique_id = channel.broadcast(self._library.get_unique_id() if self.rank == 0 else None)
            try:
                self._comm = self._library.NcclCommunicator(self.size, unique_id, self.rank)
            except Exception as cause:
                raise self._queue.fail(f"NCCL cannot make the communicator {name!r}", cause) from cause
        self._watchdog.watch(self)

    # -- verbs --------------------------------------------------------------------------------------------------------

    def _all_reduce(self, tensor: torch.Tensor, op: str, label: str) -> Handle:
        pointer, count, code = _raw(tensor)
        reduction = REDUCTION_CODES[op]
        if self._buffers is not None:
            self._buffers.sent(pointer)
        return self._issue(
            "all_reduce", tensor, lambda stream: self._comm.allReduce(pointer, pointer, count, code, reduction, stream),
            buffers=tensor, label=label, result=tensor,
        )

    def _all_gather(self, tensor: torch.Tensor, label: str) -> Handle:
        result = tensor.new_empty((self.size * tensor.shape[0], *tensor.shape[1:]))
        pointer, count, code = _raw(tensor)
        target = result.data_ptr()
        return self._issue(
            "all_gather", tensor, lambda stream: self._comm.allGather(pointer, target, count, code, stream),
            buffers=(tensor, result), label=label, result=result,
        )

    def _reduce_scatter(self, tensor: torch.Tensor, label: str) -> Handle:
        result = tensor.new_empty((tensor.shape[0] // self.size, *tensor.shape[1:]))
        pointer, _, code = _raw(tensor)
        target, count = result.data_ptr(), result.numel()
        reduction = REDUCTION_CODES["sum"]
        return self._issue(
            "reduce_scatter", tensor,
            lambda stream: self._comm.reduceScatter(pointer, target, count, code, reduction, stream),
            buffers=(tensor, result), label=label, result=result,
        )

    def _broadcast(self, tensor: torch.Tensor, root: int, label: str) -> Handle:
        pointer, count, code = _raw(tensor)
        return self._issue(
            "broadcast", tensor, lambda stream: self._comm.broadcast(pointer, pointer, count, code, root, stream),
            buffers=tensor, peer=root, label=label, result=tensor,
        )

    def _all_to_all(
        self, tensor: torch.Tensor, send_counts: list[int], recv_counts: list[int], label: str
    ) -> Handle:
        result = tensor.new_empty((sum(recv_counts), *tensor.shape[1:]))
        row, code = math.prod(tensor.shape[1:]), DTYPE_CODES[tensor.dtype]
        row_bytes, source, target = row * tensor.itemsize, tensor.data_ptr(), result.data_ptr()

        def launch(stream: int) -> None:
            sent = received = 0
            self._library.groupStart()
            for peer in range(self.size):
                if send_counts[peer] * row:
                    self._comm.send(source + sent * row_bytes, send_counts[peer] * row, code, peer, stream)
                if recv_counts[peer] * row:
                    self._comm.recv(target + received * row_bytes, recv_counts[peer] * row, code, peer, stream)
                sent += send_counts[peer]
                received += recv_counts[peer]
            self._library.groupEnd()

        return self._issue("all_to_all", tensor, launch, buffers=(tensor, result), label=label, result=result)

    def _send(self, tensor: torch.Tensor, peer: int, label: str) -> Handle:
        self._check_link(peer, "send")
        pointer, count, code = _raw(tensor)
        return self._issue(
            "send", tensor, lambda stream: self._comm.send(pointer, count, code, peer, stream),
            buffers=tensor, peer=peer, label=label,
        )

    def _recv(self, tensor: torch.Tensor, peer: int, label: str) -> Handle:
        self._check_link(peer, "recv")
        pointer, count, code = _raw(tensor)
        return self._issue(
            "recv", tensor, lambda stream: self._comm.recv(pointer, count, code, peer, stream),
            buffers=tensor, peer=peer, label=label, result=tensor,
        )

    def barrier(self) -> None:
        """The host waits here until all ranks have come and everything that they issued on this communicator is over."""
        if self._group is not None:
            raise CommunicationError(f"barrier inside a group of communicator {self.name!r}", fix="end the group first")
        self._check_usable("barrier")
        self.counters.operations += 1
        began = time.perf_counter()
        try:
            self._queue.finish()
            self._channel.barrier(deadline_s=self._queue.deadline_s)
        finally:
            self.counters.wait_s += time.perf_counter() - began

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
            self._queue.start([operation for operation, _ in collected], self._together([call for _, call in collected]))

    # -- life ---------------------------------------------------------------------------------------------------------

    def warmup(self, *, link: bool = False) -> None:
        for num_bytes in _WARMUP_BYTES:
            rows = torch.zeros(self.size, num_bytes // 4, dtype=torch.float32, device=self.device)
            if link:
                handles = [self.send(rows, 1) if self.rank == 0 else self.recv(rows, 0)]
            else:
                counts = [1] * self.size
                handles = [
                    self.all_reduce(rows[0].contiguous()), self.all_gather(rows[:1].contiguous()),
                    self.reduce_scatter(rows), self.broadcast(rows, 0), self.all_to_all(rows, counts, counts),
                ]
            for handle in handles:
                handle.wait()
        self.barrier()

    def reserve(self, num_bytes: int) -> None:
        with self._watchdog.guard(f"registering memory with the communicator {self.name!r}"):
            has_windows = all(self._channel.all_gather(self.device.type == "cuda" and can_register()))
            pointer = self._comm.comm if has_windows else None
            self._buffers = ReductionBuffers(reduction_memory(num_bytes, self.device, pointer))

    def memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        return None if self._buffers is None else self._buffers.take(shape, dtype)

    def check(self) -> None:
        error = self.poll(time.perf_counter())
        if error is not None:
            raise error

    def poll(self, now_s: float) -> CommunicationError | None:
        """What is wrong by now, for the watchdog. Never blocks; any thread may call it."""
        error, comm = self._queue.poll(now_s), self._comm
        if error is not None or comm is None:
            return error
        try:
            comm.check_async_error()
        except Exception as cause:
            return self._queue.fail(f"NCCL reports an error on communicator {self.name!r}", cause)
        return None

    def abort(self) -> None:
        """Take nothing more. NCCL's own abort is not called: it waits for ever where a live graph has its operations."""
        error = CommunicationError(f"communicator {self.name!r} was aborted")
        self._queue.failure = self._queue.failure or error
        self._watchdog.forget(self)

    def close(self) -> None:
        """Wait for everything in flight and destroy NCCL's communicator. Graphs that hold operations of it must be gone."""
        if self._comm is None:
            return
        self._watchdog.forget(self)
        if self._queue.failure is None:
            self.barrier()
            if self._buffers is not None:
                self._buffers.close()
            self._comm.destroy()
            self._channel.close()
        self._comm = None

    # -- inside -------------------------------------------------------------------------------------------------------

    def _issue(
        self,
        verb: str,
        tensor: torch.Tensor,
        launch: Launch,
        *,
        buffers: Any,
        result: torch.Tensor | None = None,
        peer: int | None = None,
        label: str = "",
    ) -> Handle:
        self._check_usable(verb)
        operation = DeviceOperation(
            self._queue, verb, tensor.nbytes, buffers=buffers, peer=peer, label=label, dtype=tensor.dtype, shape=tensor.shape
        )
        if not tensor.numel() and verb != "all_to_all":
            launch = _nothing  # the same on all ranks
        if self._group is not None:
            self._group.append((operation, launch))
        else:
            self._queue.start([operation], launch)
        return NcclHandle(self, operation, result)

    def _together(self, calls: list[Launch]) -> Launch:
        def launch(stream: int) -> None:
            self._library.groupStart()
            for call in calls:
                call(stream)
            self._library.groupEnd()

        return launch

    def _wait(self, operation: DeviceOperation, result: torch.Tensor | None) -> None:
        self._queue.order_after(operation)
        if self._buffers is not None and result is not None:
            self._buffers.reduced(result.data_ptr())

    def _check_usable(self, verb: str) -> None:
        if self._queue.failure is not None:
            raise self._queue.failure
        if self._comm is None:
            raise CommunicationError(f"{verb} on communicator {self.name!r}", found="it has been closed")
        if threading.get_ident() != self._thread:
            raise CommunicationError(
                f"{verb} on communicator {self.name!r} from thread {threading.current_thread().name}",
                found="it was made on another thread",
                fix="issue everything on one thread: NCCL needs one order, the same on all ranks",
            )

    def _check_link(self, peer: int, verb: str) -> None:
        if peer == self.rank:
            raise self._misuse(verb, f"rank {peer}, which is this rank", "another rank")
        if self._streams.is_capturing():
            raise CommunicationError(
                f"{verb} on communicator {self.name!r} while a graph is captured",
                fix="point-to-point transfers between stages stay outside graphs",
            )


def _raw(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Address, number of elements and NCCL's code of the dtype."""
    return tensor.data_ptr(), tensor.numel(), DTYPE_CODES[tensor.dtype]


def _nothing(stream: int) -> None:
    """An operation on no elements: NCCL need not be asked."""
