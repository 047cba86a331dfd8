"""Numbers on their way from a device to the host, without waiting for what the device is given afterwards.

A plain copy would stand in line behind all work queued so far; with steps queued ahead that is the next step. So copies have a
stream of their own, which waits for nothing but what they copy.
"""

from __future__ import annotations

import torch

from hpcinfer.comm.communicator import FinishedHandle, Handle


class HostCopy(Handle):
    """A copy in flight. Its result is in host memory."""

    def __init__(self, copied: torch.Tensor, event: torch.cuda.Event, label: str) -> None:
        self._copied = copied
        self._event = event
        self.label = label

    def wait(self) -> torch.Tensor:
        self._event.synchronize()
        return self._copied

    def done(self) -> bool:
        return self._event.query()


class HostCopies:
    """Starts copies to the host. On the CPU there is nothing to copy.

    Args:
        device: where the tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def of_tensor(self, tensor: torch.Tensor, label: str) -> Handle:
        """Copy what the current stream has computed by now."""
        if self._stream is None:
            return FinishedHandle(tensor, label)
        self._stream.wait_event(torch.cuda.current_stream(tensor.device).record_event())
        with torch.cuda.stream(self._stream):
            return self._start(tensor, label)

    def of_transfer(self, handle: Handle) -> Handle:
        """Copy the result of a transfer when it has come; what the current stream computes meanwhile does not matter."""
        if self._stream is None:
            return handle
        with torch.cuda.stream(self._stream):
            return self._start(handle.wait(), handle.label)

    def _start(self, tensor: torch.Tensor, label: str) -> Handle:
        copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        copied.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)  # its memory is the computing stream's
        return HostCopy(copied, self._stream.record_event(), label)
