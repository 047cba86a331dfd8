"""Brings the extents of a checkpoint to every rank: each is read from the file system by one of them and broadcast.

    reader   file system -> host buffers (two, read ahead) -> transfer buffer -> broadcast
    others                                                    transfer buffer <- broadcast

All ranks go through the extents in the same order with two transfer buffers: while one extent is sliced, the next
travels. So a rank holds two extents on its device, and a reader two more in host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from hpcinfer.comm.communicator import Communicator, Handle
from hpcinfer.errors import CheckpointError
from hpcinfer.models.extent_reader import ExtentReader
from hpcinfer.models.extents import Extent

NUM_BUFFERS = 2
_GOOD, _BAD = 0, 1


class WeightStream:
    """One passage of all extents. Collective over the communicator: equal extents and readers on all of its ranks.

    Args:
        extents: see `plan_extents`.
        communicator: of all ranks that load; nothing else may be in flight on it.
        readers: ranks of it that read; extent i is read by readers[i % len(readers)].
    """

    def __init__(self, extents: Sequence[Extent], communicator: Communicator, readers: Sequence[int]) -> None:
        self.bytes_read = 0
        """Bytes that this rank got from the file system."""
        self._extents = extents
        self._communicator = communicator
        self._readers = readers
        self._error: CheckpointError | None = None
        # The byte after an extent says whether its sender is well.
        size = 1 + max((extent.num_bytes for extent in extents), default=0)
        self._buffers = [
            torch.empty(size, dtype=torch.uint8, device=communicator.device) for _ in extents[:NUM_BUFFERS]
        ]

    def run(self, take: Callable[[Extent, torch.Tensor], None]) -> CheckpointError | None:
        """Call `take` with each extent and its bytes, uint8 on the communicator's device, which are overwritten afterwards.

        Returns:
            What this rank could not read, or what `take` raised. A reader tells the others with the next extent that it
            sends, and all stop there; errors of other ranks are known to them alone until the end.
        """
        communicator, extents = self._communicator, self._extents
        own = [extent for number, extent in enumerate(extents) if self._reader_of(number) == communicator.rank]
        with ExtentReader(own, pin=communicator.device.type == "cuda") as source:
            arriving = self._send(0, source) if extents else None
            for number, extent in enumerate(extents):
                following = self._send(number + 1, source) if number + 1 < len(extents) else None
                data = arriving.wait()
                self.bytes_read = source.bytes_read
                if data[-1].item() != _GOOD:
                    if following is not None:
                        following.wait()
                    break
                if self._error is None:
                    try:
                        take(extent, data[:-1])
                    except CheckpointError as error:
                        self._error = error
                arriving = following
        return self._error

    def _reader_of(self, number: int) -> int:
        return self._readers[number % len(self._readers)]

    def _send(self, number: int, source: ExtentReader) -> Handle:
        """Take part in the broadcast of an extent; its reader waits for the file system first."""
        extent, root = self._extents[number], self._reader_of(number)
        buffer = self._buffers[number % NUM_BUFFERS][: extent.num_bytes + 1]
        if root == self._communicator.rank:
            if self._error is None:
                try:
                    source.take(buffer[:-1])
                except CheckpointError as error:
                    self._error = error
            buffer[-1] = _GOOD if self._error is None else _BAD
        return self._communicator.broadcast(buffer, root, label=f"extent {number}")
