"""Memory for tensors that are about to be all-reduced: the same few addresses again and again, in a window that all ranks of a
communicator have registered where that can be had. NCCL then reads and writes the other ranks' windows directly, without a
copy into buffers of its own (symmetric memory, NCCL 2.27 and newer through nccl4py).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable

import torch

NUM_BUFFERS = 4
"""Two microbatches have a reduction each in flight, and two more are being computed into or consumed."""
_ALIGNMENT = 4096
_SYMMETRIC_WINDOW = 1
"""NCCL_WIN_COLL_SYMMETRIC."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReductionMemory:
    """Memory, and how to give it back."""

    buffers: tuple[torch.Tensor, ...]
    """uint8, of one size each."""
    is_window: bool
    """Registered with all ranks of the communicator."""
    release: Callable[[], None]
    """Before NCCL's communicator is destroyed; nothing may be in flight."""


def can_register() -> bool:
    """Whether this rank has nccl4py, which registers windows. All ranks of a communicator must, or none does."""
    return importlib.util.find_spec("nccl") is not None


def reduction_memory(num_bytes: int, device: torch.device, comm_pointer: int | None) -> ReductionMemory:
    """Buffers of at least `num_bytes` each.

    Args:
        comm_pointer: address of NCCL's communicator, with all of whose ranks a window is registered: collective, and `can_register`
            must hold on each; None takes plain memory.
    """
    size = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
    if comm_pointer is not None:
        return _window(size, device, comm_pointer)
    whole = torch.zeros(NUM_BUFFERS * size, dtype=torch.uint8, device=device)
    return ReductionMemory(buffers=whole.split(size), is_window=False, release=lambda: None)


def _window(size: int, device: torch.device, comm_pointer: int) -> ReductionMemory:
    from nccl.core import Communicator, WindowFlag
    from nccl.core.interop.torch import empty

    whole = empty((NUM_BUFFERS * size,), dtype=torch.uint8, device=device)
    whole.zero_()
    wrapped = Communicator(ptr=comm_pointer)
    window = wrapped.register_window(whole, WindowFlag(_SYMMETRIC_WINDOW))
    return ReductionMemory(buffers=whole.split(size), is_window=bool(window.handle), release=window.close)


class ReductionBuffers:
    """Gives the buffers away in turns. One that is in flight is never given away.

    Args:
        memory: for `NUM_BUFFERS` tensors.
    """

    def __init__(self, memory: ReductionMemory) -> None:
        self._memory = memory
        self._addresses = {buffer.data_ptr(): index for index, buffer in enumerate(memory.buffers)}
        self._in_flight: set[int] = set()
        self._next = 0

    @property
    def is_window(self) -> bool:
        """See ReductionMemory."""
        return self._memory.is_window

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """A tensor in the next buffer; None where it would not fit, or the buffer's last reduction was not waited for."""
        index, num_bytes = self._next, math.prod(shape) * dtype.itemsize
        buffer = self._memory.buffers[index]
        if num_bytes > buffer.numel() or index in self._in_flight:
            return None
        self._next = (index + 1) % len(self._memory.buffers)
        return buffer[:num_bytes].view(dtype).view(shape)

    def sent(self, address: int) -> None:
        """The tensor at `address`, if it is one of these, is in flight from now on."""
        if address in self._addresses:
            self._in_flight.add(self._addresses[address])

    def reduced(self, address: int) -> None:
        """Its reduction was waited for."""
        self._in_flight.discard(self._addresses.get(address, -1))

    def close(self) -> None:
        """Give the memory back."""
        self._memory.release()
