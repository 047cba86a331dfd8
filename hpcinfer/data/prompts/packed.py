"""Packed columns: values of different lengths as one flat dataset `data` and the `offsets` between them.

Row r is `data[offsets[r] : offsets[r + 1]]`. Both are chunked and checksummed (fletcher32), because a flipped bit is
silent without it. Writers append in blocks and hold a few MiB, however many rows there are; readers hand out blocks.
"""

from __future__ import annotations

import array
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import h5py
import numpy as np

from hpcinfer.data.hdf5 import CHUNK_BYTES, Interval, read_around_damage
from hpcinfer.errors import DataError

FLUSH_BYTES = 1 << 20
BLOCK_ROWS = 16384
BLOCK_BYTES = 8 << 20
"""Most bytes of `data` in one block, unless a single row is longer."""
MAX_ROW_BYTES = 64 << 20
"""A longer row is a failed row: no model reads 64 MiB, and one corrupt offset must not ask for all memory."""

_TYPE_CODES = {"u1": "B", "i1": "b", "i4": "i", "i8": "q", "f8": "d"}


class ColumnWriter:
    """Writes one growing column of numbers in little-endian `dtype`, chunked and checksummed.

    The data set is created when the first block is full, or at the end: a column shorter than a chunk gets a chunk of
    its own size, so that small files are small. Rows may be skipped forwards; they read as `fill` and cost nothing.

    Args:
        first_row: rows before it are skipped.
        attributes: of the data set.
    """

    def __init__(
        self,
        group: h5py.Group,
        name: str,
        dtype: str,
        *,
        fill: float | int = 0,
        first_row: int = 0,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        self._group = group
        self._name = name
        self._dtype = np.dtype("<" + dtype)
        self._code = _TYPE_CODES[dtype]
        self._fill = fill
        self._attributes = attributes or {}
        self._buffer = array.array(self._code)
        self._most = FLUSH_BYTES // self._dtype.itemsize
        self._flushed = first_row
        self._dataset: h5py.Dataset | None = None

    @property
    def num_rows(self) -> int:
        """Rows appended or skipped so far."""
        return self._flushed + len(self._buffer)

    def append(self, value: int | float) -> None:
        """Adds one value. Raises OverflowError when it does not fit the column's dtype."""
        self._buffer.append(value)
        if len(self._buffer) >= self._most:
            self.flush()

    def extend(self, values: bytes | Sequence[int] | np.ndarray) -> None:
        """Adds values; bytes are taken as raw u1."""
        if isinstance(values, np.ndarray):
            values = np.ascontiguousarray(values, self._dtype).tobytes()
        if isinstance(values, bytes):
            self._buffer.frombytes(values)
        else:
            self._buffer.extend(values)
        if len(self._buffer) >= self._most:
            self.flush()

    def skip_to(self, row: int) -> None:
        """Leaves rows up to `row` at the fill value. HDF5 stores no chunk for a long gap."""
        gap = row - self.num_rows
        if 0 < gap <= self._most:
            self._buffer.extend([self._fill] * gap)
        elif gap > 0:
            self.flush()
            self._flushed = row

    def flush(self) -> None:
        """Hands buffered values to HDF5."""
        if self._buffer:
            end = self.num_rows
            self._resize(end, CHUNK_BYTES // self._dtype.itemsize)
            self._dataset[self._flushed :] = np.frombuffer(self._buffer, self._dtype)
            self._flushed = end
            self._buffer = array.array(self._code)

    def finish(self, num_rows: int) -> None:
        """Writes what is left and sets the final length."""
        whole_chunk = CHUNK_BYTES // self._dtype.itemsize
        self.skip_to(num_rows)
        self._resize(num_rows, max(1, min(num_rows, whole_chunk)))
        self.flush()

    def _resize(self, num_rows: int, rows_a_chunk: int) -> None:
        if self._dataset is None:
            self._dataset = self._group.create_dataset(
                self._name,
                (num_rows,),
                self._dtype,
                maxshape=(None,),
                chunks=(rows_a_chunk,),
                fletcher32=True,
                fillvalue=self._fill,
            )
            self._dataset.attrs.update(self._attributes)
        else:
            self._dataset.resize((num_rows,))


class PackedWriter:
    """Writes `data` and `offsets` into a group, row by row, in memory that does not grow with the rows.

    Args:
        group: where the two datasets are created.
        dtype: "u1" for text or "i4" for token ids.
        first_row: rows before it are empty (a column that first appears in a later row).
    """

    def __init__(self, group: h5py.Group, dtype: str, *, first_row: int = 0) -> None:
        self._data = ColumnWriter(group, "data", dtype)
        self._offsets = ColumnWriter(group, "offsets", "i8", first_row=first_row)
        self._offsets.append(0)
        self._end = 0

    @property
    def num_rows(self) -> int:
        """Rows appended so far."""
        return self._offsets.num_rows - 1

    def append(self, values: bytes | Sequence[int] | np.ndarray) -> None:
        """Adds one row. Raises OverflowError for a token id outside int32."""
        self._data.extend(values)
        self._end += len(values)
        self._offsets.append(self._end)

    def skip_to(self, row: int) -> None:
        """Makes rows up to `row` empty."""
        for _ in range(row - self.num_rows):
            self._offsets.append(self._end)

    def finish(self, num_rows: int) -> None:
        """Writes what is left; rows up to `num_rows` that were never appended are empty."""
        self.skip_to(num_rows)
        self._data.finish(self._end)
        self._offsets.finish(num_rows + 1)


@dataclasses.dataclass(slots=True)
class PackedBlock:
    """Consecutive rows of a packed column."""

    first_row: int
    data: np.ndarray
    """The flat values that the rows of this block lie in."""
    starts: np.ndarray
    """int64 [rows]: where in `data` each row begins."""
    stops: np.ndarray
    """int64 [rows]: where it ends."""
    problems: dict[int, str]
    """Row number -> why it cannot be read. Such a row has start = stop = 0."""

    def __len__(self) -> int:
        return len(self.starts)


class PackedColumn:
    """Reads a packed column in blocks. A damaged row is a problem of that row alone."""

    def __init__(self, data: h5py.Dataset, offsets: h5py.Dataset) -> None:
        for dataset in (data, offsets):
            if dataset.ndim != 1 or dataset.dtype.kind not in "iu":
                raise DataError(
                    f"{dataset.name} of {dataset.file.filename} cannot be part of a packed column",
                    found=f"shape {dataset.shape}, dtype {dataset.dtype}",
                    fix="data and offsets must be one-dimensional integers",
                )
        if len(offsets) == 0:
            raise DataError(f"{offsets.name} of {offsets.file.filename} is empty", fix="rows + 1 offsets are needed")
        self.data = data
        self.offsets = offsets
        self.num_rows = len(offsets) - 1

    def blocks(self, start: int, stop: int) -> Iterator[PackedBlock]:
        """Yields rows [start, stop) in blocks of at most BLOCK_ROWS rows and about BLOCK_BYTES bytes."""
        for first in range(start, stop, BLOCK_ROWS):
            last = min(first + BLOCK_ROWS, stop)
            starts, stops, problems = self._bounds(first, last)
            yield from self._read(first, starts, stops, problems)

    def _bounds(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        """Begin and end of rows [first, last) in `data`, and what is wrong with them."""
        # Two offsets more on each side show which end of an inversion is the corrupt one, wherever a block begins.
        low, high = max(first - 2, 0), min(last + 3, len(self.offsets))
        values, damaged = read_around_damage(self.offsets, low, high)
        bounds = values.astype(np.int64)
        problems: dict[int, str] = {}
        wrong = (bounds < 0) | (bounds > len(self.data))
        for begin, end in damaged:
            wrong[begin - low : end - low] = True
        doubtful = wrong | _out_of_order(bounds, ~wrong)
        starts = bounds[first - low : last - low].copy()
        stops = bounds[first - low + 1 : last - low + 1].copy()
        bad = doubtful[first - low : last - low] | doubtful[first - low + 1 : last - low + 1]
        for index in np.flatnonzero(bad):
            problems[first + int(index)] = "the offsets of this row are damaged or out of order"
        too_long = ~bad & ((stops - starts) * self.data.dtype.itemsize > MAX_ROW_BYTES)
        for index in np.flatnonzero(too_long):
            num_bytes = int(stops[index] - starts[index]) * self.data.dtype.itemsize
            problems[first + int(index)] = f"the row has {num_bytes} bytes; the most is {MAX_ROW_BYTES}"
        starts[bad | too_long] = stops[bad | too_long] = 0
        return starts, stops, problems

    def _read(
        self, first: int, starts: np.ndarray, stops: np.ndarray, problems: dict[int, str]
    ) -> Iterator[PackedBlock]:
        used = stops > starts
        low = int(starts[used].min()) if used.any() else 0
        high = int(stops[used].max()) if used.any() else 0
        if len(starts) > 1 and (high - low) * self.data.dtype.itemsize > BLOCK_BYTES:
            half = len(starts) // 2
            yield from self._read(first, starts[:half], stops[:half], problems)
            yield from self._read(first + half, starts[half:], stops[half:], problems)
            return
        if high > low:
            data, damaged = read_around_damage(self.data, low, high)
        else:
            data, damaged = np.empty(0, self.data.dtype), []
        mine = {row: text for row, text in problems.items() if first <= row < first + len(starts)}
        for row in _rows_touching(damaged, starts, stops):
            mine[first + row] = "a chunk of the data that this row lies in fails its checksum"
        starts, stops = np.where(used, starts - low, 0), np.where(used, stops - low, 0)
        yield PackedBlock(first, data, starts, stops, mine)


def _out_of_order(bounds: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Marks the offsets that break the order. Where either of two may be the corrupt one, both are marked."""
    marked = np.zeros(len(bounds), bool)
    places = np.flatnonzero(known)
    values = bounds[places]
    for index in np.flatnonzero(values[:-1] > values[1:]):
        # The left one may be wrong if leaving it out restores the order, and likewise the right one.
        left = index == 0 or values[index - 1] <= values[index + 1]
        right = index + 2 >= len(values) or values[index] <= values[index + 2]
        if left or not right:
            marked[places[index]] = True
        if right or not left:
            marked[places[index + 1]] = True
    return marked


def _rows_touching(damaged: list[Interval], starts: np.ndarray, stops: np.ndarray) -> Iterator[int]:
    for low, high in damaged:
        yield from (int(row) for row in np.flatnonzero((starts < high) & (stops > low)))
