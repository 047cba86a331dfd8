"""The file under an HDF5 file that is being written: it takes every write, and remembers the first that failed.

HDF5 keeps what it could not write and tries again when the process ends, and then crashes (seen: a full disk ended h5py
by SIGSEGV). So the library never hears of a failure: what the disk refuses is kept in memory, the owner sees `error`,
gives up, and the file is thrown away.
"""

from __future__ import annotations

import os
from pathlib import Path


class OutputFile:
    """A file object for `h5py.File(OutputFile(path), "w")`; the caller closes the h5py.File first, then this."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._position = 0
        self._size = 0
        self._kept: list[tuple[int, bytes]] = []
        self.error: OSError | None = None
        """The first failed write; from then on nothing reaches the disk."""

    def check(self) -> None:
        """Raises the OSError of the first failed write, if there was one."""
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)

    # What h5py's file object driver calls.

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As of any file."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """As of any file."""
        return self._position

    def write(self, data: memoryview) -> int:
        """Takes all of `data`, to the disk or to memory."""
        view = memoryview(data).cast("B")
        self._put(view, self._position)
        self._position += len(view)
        self._size = max(self._size, self._position)
        return len(view)

    def _put(self, view: memoryview, offset: int) -> None:
        try:
            while view and self.error is None:
                written = os.pwrite(self._descriptor, view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            self.error = error
        if view:
            self._kept.append((offset, bytes(view)))

    def readinto(self, buffer: memoryview) -> int:
        """Fills `buffer`; what was never written reads as zeros, as HDF5 may ask for it."""
        view = memoryview(buffer).cast("B")
        start, stop = self._position, self._position + len(view)
        found = os.pread(self._descriptor, len(view), start)
        view[: len(found)] = found
        view[len(found) :] = bytes(len(view) - len(found))
        for offset, data in self._kept:
            low, high = max(offset, start), min(offset + len(data), stop)
            if low < high:
                view[low - start : high - start] = data[low - offset : high - offset]
        self._position = stop
        return len(view)

    def read(self, num_bytes: int) -> bytes:
        """As of any file; h5py asks for it to recognise a file object."""
        buffer = bytearray(num_bytes)
        self.readinto(buffer)
        return bytes(buffer)

    def truncate(self, size: int | None = None) -> int:
        """As of any file."""
        size = self._position if size is None else size
        try:
            if self.error is None:
                os.ftruncate(self._descriptor, size)
        except OSError as error:
            self.error = error
        self._size = size
        return size

    def flush(self) -> None:
        """Nothing is held back here."""
