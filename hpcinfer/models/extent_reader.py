"""Reads extents ahead: background threads fill host buffers from the file system while earlier ones travel."""

from __future__ import annotations

import collections
import os
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from hpcinfer.errors import CheckpointError
from hpcinfer.models.extents import Extent, FileRange

NUM_BUFFERS = 2
"""Extents that are read, or wait to be taken, at a time."""
NUM_THREADS = 8
"""Reads in flight: one stream alone does not reach the rate of a parallel file system."""
READ_BYTES = 4 * 2**20
"""Bytes asked for at once by one thread."""


class ExtentReader:
    """The extents that this rank reads, one after the other. Use it in a `with` block, which ends threads and files.

    Args:
        extents: in the order in which they will be taken; reading begins at once.
        pin: page-locked buffers, from which a GPU copies at its full rate.
    """

    def __init__(self, extents: Sequence[Extent], *, pin: bool = False) -> None:
        self.bytes_read = 0
        """Bytes that came from the file system, of the extents that were taken."""
        self._to_begin = collections.deque(extents)
        self._begun: collections.deque[tuple[Extent, torch.Tensor, list[Future]]] = collections.deque()
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(NUM_THREADS, "hpcinfer-weights")
        size = max((extent.num_bytes for extent in extents), default=0)
        for _ in extents[:NUM_BUFFERS]:
            self._begin(torch.empty(size, dtype=torch.uint8, pin_memory=pin))

    def __enter__(self) -> ExtentReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def take(self, target: torch.Tensor) -> None:
        """Copy the next extent into `target`, uint8 [its bytes] on any device, as soon as it has been read.

        Raises:
            CheckpointError: it cannot be read; names file and host. Nothing more can be taken then.
        """
        extent, buffer, reads = self._begun.popleft()
        self.bytes_read += sum(read.result() for read in reads)
        # Returns when the copy is over, on a GPU too: the buffer is free again.
        target.copy_(buffer[: extent.num_bytes])
        if self._to_begin:
            self._begin(buffer)

    def _begin(self, buffer: torch.Tensor) -> None:
        extent = self._to_begin.popleft()
        memory = memoryview(buffer.numpy())
        reads = [
            self._pool.submit(self._read, part, memory[part.offset : part.offset + part.num_bytes])
            for part in extent.ranges(READ_BYTES)
        ]
        self._begun.append((extent, buffer, reads))

    def _read(self, part: FileRange, memory: memoryview) -> int:
        """Fill `memory` from the file and return its size. Runs on the pool's threads."""
        done = 0
        try:
            descriptor = self._open(part.path)
            while done < len(memory):
                # A signal is no error here (PEP 475), and a short read is none.
                count = os.preadv(descriptor, [memory[done:]], part.start + done)
                if count == 0:
                    raise CheckpointError(
                        f"{part.path} has become shorter since its header was read",
                        found=f"no byte {part.start + done} on host {socket.gethostname()}",
                        fix="copy the file again, and let nothing write to it while a job runs",
                    )
                done += count
        except OSError as error:
            raise CheckpointError(f"cannot read {part.path}", found=f"{error} on host {socket.gethostname()}") from None
        return done

    def _open(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
            return self._descriptors[path]
