"""The generations file, version 1: of a segment and of the merged output alike (schema: datasets/GENERATIONS.md)."""

from __future__ import annotations

import contextlib
import errno
import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np

from hpcinfer.data.generation_table import OFFSET_COLUMNS, RAGGED_COLUMNS, SCALAR_COLUMNS, GenerationTable, Ragged
from hpcinfer.data.optional_columns import OPTIONAL_COLUMNS, OPTIONAL_RAGGED, OPTIONAL_SCALARS
from hpcinfer.errors import DataError
from hpcinfer.request import FinishReason, Generation, Status

FORMAT = "hpcinfer-generations"
VERSION = 1
GROUP = "generations"
CHUNK_BYTES = 64 * 1024
# The 1.10 format checksums metadata too (superblock, object headers, chunk index): a flipped bit anywhere is found.
LIBVER = ("v110", "v110")
_BLOCK_ROWS = 8192
_BLOCK_BYTES = 8 * 2**20
_ENUMS = {
    "status": {member.name.lower(): int(member) for member in Status},
    "finish_reason": {member.name.lower(): int(member) for member in FinishReason},
}


def column_names(optional: Iterable[str] = ()) -> list[str]:
    """Names of all data sets of the group, offsets included, with some of the `OPTIONAL_COLUMNS`."""
    names = []
    for name in (*SCALAR_COLUMNS, *RAGGED_COLUMNS, *optional):
        names += [name, OFFSET_COLUMNS[name]] if name in OFFSET_COLUMNS else [name]
    return names


def column_dtype(name: str) -> np.dtype:
    """The stored dtype of a data set of the group."""
    if name in OFFSET_COLUMNS.values():
        return np.dtype("i8")
    return (SCALAR_COLUMNS | RAGGED_COLUMNS | OPTIONAL_SCALARS | OPTIONAL_RAGGED)[name]


def write_root_attributes(file: h5py.File, run_uuid: str, complete: bool) -> None:
    """format, version, run and complete (0 or 1)."""
    file.attrs["format"] = FORMAT
    file.attrs["version"] = VERSION
    file.attrs["run"] = run_uuid
    file.attrs["complete"] = np.uint8(complete)


def write_enum_attribute(dataset: h5py.Dataset, name: str) -> None:
    """The names of the values of `status` and `finish_reason`, as JSON in the attribute `enum`."""
    if name in _ENUMS:
        dataset.attrs["enum"] = json.dumps(_ENUMS[name])


def encode_table(table: GenerationTable, run_uuid: str) -> bytes:
    """A whole HDF5 file as bytes, its rows sorted by (row, sample), every data set chunked with fletcher32.

    The file is built in memory, so that what reaches the disk is one stream of bytes that is either all there or not.
    """
    table = table.sorted()
    # HDF5 tells files in memory apart by name: threads that build one at the same time need names of their own.
    unused_path = f"segment-{threading.get_ident()}"
    with h5py.File(unused_path, "w", driver="core", backing_store=False, libver=LIBVER) as file:
        write_root_attributes(file, run_uuid, complete=False)
        group = file.create_group(GROUP)
        for name in column_names(table.optional):
            values = _column(table, name)
            if values.size:
                chunk = min(len(values), max(1, CHUNK_BYTES // values.itemsize))
                dataset = group.create_dataset(name, data=values, chunks=(chunk,), fletcher32=True)
            else:
                dataset = group.create_dataset(name, shape=(0,), dtype=values.dtype)
            write_enum_attribute(dataset, name)
        file.flush()
        return file.id.get_file_image()


def encode_generations(generations: Sequence[Generation], run_uuid: str) -> bytes:
    """`encode_table` of a list of Generations."""
    return encode_table(GenerationTable.from_generations(generations), run_uuid)


def _column(table: GenerationTable, name: str) -> np.ndarray:
    for ragged, offsets in OFFSET_COLUMNS.items():
        if name == offsets:
            return _values(table, ragged).offsets
    values = _values(table, name)
    return values.data if isinstance(values, Ragged) else values


def _values(table: GenerationTable, name: str) -> np.ndarray | Ragged:
    return table.optional[name] if name in OPTIONAL_COLUMNS else getattr(table, name)


class GenerationFile:
    """A generations file, open for reading (a context manager). Memory stays flat whatever the size of the file.

    Opening checks the format, the data sets, their dtypes and lengths; reading checks the offsets and, through HDF5,
    the checksums. Files are opened without locks, which many parallel file systems refuse.

    Raises FileNotFoundError; DataError where the file is not what it says; OSError with its errno where the file
    system, not the file, is at fault (EIO, EMFILE, EACCES ...).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = h5py.File(self.path, "r", locking=False)
        except OSError as error:
            if error.errno:
                raise
            raise DataError(f"{self.path} is not a readable HDF5 file", found=_first_line(error)) from error
        try:
            self._check_structure()
        except (DataError, OSError, KeyError, RuntimeError, ValueError) as error:
            self.close()
            if isinstance(error, DataError):
                raise
            raise self._unreadable(error) from error

    def _check_structure(self) -> None:
        attributes = self._file.attrs
        found = (_as_text(attributes.get("format", "")), int(attributes.get("version", 0)))
        if found != (FORMAT, VERSION):
            raise DataError(
                f"{self.path} is not a generations file of version {VERSION}",
                found=f"format {found[0]!r}, version {found[1]}",
            )
        self.run_uuid: str = _as_text(attributes.get("run", ""))
        """The run that it belongs to."""
        self.complete: bool = bool(attributes.get("complete", 0))
        """Whether every (row, sample) of the run is in it, as ok or failed. False in every segment."""
        group = self._file.get(GROUP)
        if not isinstance(group, h5py.Group):
            raise DataError(f"{self.path} has no group /{GROUP}", found=f"{sorted(self._file)}")
        self.optional: tuple[str, ...] = tuple(name for name in OPTIONAL_COLUMNS if name in group)
        """Those of the `OPTIONAL_COLUMNS` that it has."""
        self.ragged: dict[str, np.dtype] = RAGGED_COLUMNS | {
            name: OPTIONAL_RAGGED[name] for name in self.optional if name in OPTIONAL_RAGGED
        }
        """Its ragged columns, and the dtypes of their values."""
        self._columns: dict[str, h5py.Dataset] = {}
        for name in column_names(self.optional):
            dataset = group.get(name)
            if not isinstance(dataset, h5py.Dataset) or dataset.ndim != 1 or dataset.dtype != column_dtype(name):
                found_text = f"{dataset.dtype} {dataset.shape}" if isinstance(dataset, h5py.Dataset) else "nothing"
                raise DataError(
                    f"{self.path}: /{GROUP}/{name} must be {column_dtype(name)} with one dimension", found=found_text
                )
            self._columns[name] = dataset
        self.num_rows: int = len(self._columns["row"])
        """Rows in this file."""
        for name, dataset in self._columns.items():
            expected = self.num_rows + (name in OFFSET_COLUMNS.values())
            if name not in self.ragged and len(dataset) != expected:
                raise DataError(f"{self.path}: /{GROUP}/{name} has {len(dataset)} values", fix=f"it needs {expected}")
        for name in self.ragged:
            offsets, size = self._columns[OFFSET_COLUMNS[name]], len(self._columns[name])
            if int(offsets[0]) != 0 or int(offsets[-1]) != size:
                raise DataError(
                    f"{self.path}: /{GROUP}/{OFFSET_COLUMNS[name]} must go from 0 to {size}",
                    found=f"{int(offsets[0])} to {int(offsets[-1])}",
                )

    def _unreadable(self, error: Exception) -> DataError:
        return DataError(f"{self.path} cannot be read: damaged or cut short", found=_first_line(error))

    def __enter__(self) -> GenerationFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; twice does no harm."""
        # What was read was checked; that the descriptor of a file open for reading closes badly (EIO) takes nothing
        # away.
        with contextlib.suppress(OSError, RuntimeError):
            self._file.close()

    def __len__(self) -> int:
        return self.num_rows

    def column(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Values [start:stop) of one data set of the group. Raises DataError where the file is damaged."""
        try:
            return self._columns[name][start:stop]
        except (OSError, RuntimeError) as error:
            if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
                raise
            raise self._unreadable(error) from error

    def rows(self) -> np.ndarray:
        """uint64 [R]: row numbers in the prompts."""
        return self.column("row")

    def samples(self) -> np.ndarray:
        """uint16 [R]."""
        return self.column("sample")

    def statuses(self) -> np.ndarray:
        """uint8 [R]: values of `Status`."""
        return self.column("status")

    def offsets(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """int64 [stop - start + 1] offsets of a ragged column (text, token_ids, ...), checked never to fall."""
        stop = self.num_rows if stop is None else stop
        offsets = self.column(OFFSET_COLUMNS[name], start, stop + 1)
        if offsets[0] < 0 or np.any(np.diff(offsets) < 0) or offsets[-1] > len(self._columns[name]):
            raise DataError(f"{self.path}: /{GROUP}/{OFFSET_COLUMNS[name]} falls between rows {start} and {stop}")
        return offsets

    def table(self, start: int = 0, stop: int | None = None) -> GenerationTable:
        """The rows at positions [start, stop) of the file, in columns."""
        stop = self.num_rows if stop is None else stop
        scalars = {name: self.column(name, start, stop) for name in SCALAR_COLUMNS}
        if np.any(scalars["status"] > max(Status)) or np.any(scalars["finish_reason"] > max(FinishReason)):
            raise DataError(f"{self.path}: unknown status or finish_reason between rows {start} and {stop}")
        ragged = {name: self._ragged(name, start, stop) for name in RAGGED_COLUMNS}
        optional = {
            name: self._ragged(name, start, stop) if name in self.ragged else self.column(name, start, stop)
            for name in self.optional
        }
        return GenerationTable(**scalars, **ragged, optional=optional)

    def _ragged(self, name: str, start: int, stop: int) -> Ragged:
        offsets = self.offsets(name, start, stop)
        return Ragged(self.column(name, int(offsets[0]), int(offsets[-1])), offsets - offsets[0])

    def tables(self, max_rows: int = _BLOCK_ROWS, max_bytes: int = _BLOCK_BYTES) -> Iterator[GenerationTable]:
        """The file from start to end in tables of at most `max_rows` rows and about `max_bytes` bytes (one row at
        least).
        """
        start = 0
        while start < self.num_rows:
            stop = min(self.num_rows, start + max_rows)
            sizes = np.zeros(stop - start, np.int64)
            for name, dtype in self.ragged.items():
                sizes += np.diff(self.offsets(name, start, stop)) * dtype.itemsize
            fitting = int(np.searchsorted(np.cumsum(sizes), max_bytes, side="right"))
            stop = start + max(1, min(fitting, stop - start))
            yield self.table(start, stop)
            start = stop

    def __iter__(self) -> Iterator[Generation]:
        for table in self.tables():
            yield from table.generations()

    def validate(self) -> None:
        """Reads everything once: checksums, offsets, enum values. Raises DataError."""
        for _ in self.tables():
            pass

    def find(self, row: int, sample: int = 0) -> Generation | None:
        """The generation of (row, sample), or None. Files are sorted, so this is a binary search: O(log R) reads."""
        low, high = 0, self.num_rows
        while low < high:
            middle = (low + high) // 2
            key = (int(self.column("row", middle, middle + 1)[0]), int(self.column("sample", middle, middle + 1)[0]))
            if key < (row, sample):
                low = middle + 1
            else:
                high = middle
        if low == self.num_rows:
            return None
        found = next(self.table(low, low + 1).generations())
        return found if found.key == (row, sample) else None


def _as_text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
