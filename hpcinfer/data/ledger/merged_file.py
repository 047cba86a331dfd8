"""The merged file as it is written: columns that grow, on a sink that keeps write errors away from HDF5."""

from __future__ import annotations

import io
import os
from collections.abc import Collection
from pathlib import Path

import h5py
import numpy as np

from hpcinfer.data import generations as format_v1
from hpcinfer.data.generation_table import OFFSET_COLUMNS, RAGGED_COLUMNS, SCALAR_COLUMNS, GenerationTable, Ragged
from hpcinfer.data.optional_columns import OPTIONAL_COLUMNS


class Sink(io.RawIOBase):
    """The file under HDF5. HDF5 crashes the process at exit when a write fails under an open file (FACTS.md), so a
    failed write is remembered, the rest is passed over, and `check` raises it where Python can handle it.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._position = 0
        self._end = 0
        self._error: OSError | None = None

    def check(self) -> None:
        """Raises the first OSError of a write."""
        if self._error is not None:
            raise self._error

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._end}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer) -> int:
        data = os.pread(self._descriptor, len(buffer), self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        count = len(view)
        try:
            position = self._position
            while view and self._error is None:
                written = os.pwrite(self._descriptor, view, position)
                view, position = view[written:], position + written
        except OSError as error:
            self._error = error
        self._position += count
        self._end = max(self._end, self._position)
        return count

    def truncate(self, size: int | None = None) -> int:
        size = self._position if size is None else size
        try:
            if self._error is None:
                os.ftruncate(self._descriptor, size)
        except OSError as error:
            self._error = error
        self._end = size
        return size

    def finish(self) -> None:
        """Makes the bytes durable and closes. Raises OSError."""
        try:
            self.check()
            os.fsync(self._descriptor)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Closes."""
        if self._descriptor >= 0:
            # A close() that fails has closed all the same: never twice.
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


class MergedColumns:
    """The columns of the merged file, appended to.

    Args:
        optional: names of the optional columns that it has.
    """

    def __init__(self, file: h5py.File, optional: Collection[str] = ()) -> None:
        group = file.create_group(format_v1.GROUP)
        self._optional = [name for name in OPTIONAL_COLUMNS if name in optional]
        self._columns = {}
        for name in format_v1.column_names(self._optional):
            dtype = format_v1.column_dtype(name)
            chunk = (format_v1.CHUNK_BYTES // dtype.itemsize,)
            dataset = group.create_dataset(name, (0,), dtype, chunks=chunk, maxshape=(None,), fletcher32=True)
            format_v1.write_enum_attribute(dataset, name)
            self._columns[name] = dataset
        for name, offsets in OFFSET_COLUMNS.items():
            if name in self._columns:
                self._append(offsets, np.zeros(1, np.int64))

    def _append(self, name: str, values: np.ndarray) -> None:
        dataset = self._columns[name]
        start = len(dataset)
        if len(values):
            dataset.resize((start + len(values),))
            dataset[start:] = values

    def append(self, table: GenerationTable) -> None:
        """Adds the rows of a table, which must come after all rows before."""
        columns = {name: getattr(table, name) for name in (*SCALAR_COLUMNS, *RAGGED_COLUMNS)}
        columns |= {name: table.optional_column(name) for name in self._optional}
        for name, values in columns.items():
            if isinstance(values, Ragged):
                self._append(OFFSET_COLUMNS[name], values.offsets[1:] + len(self._columns[name]))
                values = values.data
            self._append(name, values)
