"""HDF5 as a careful user needs it: opening inputs, naming what is inside, reading around damage, new files whole.

Inputs are opened with `locking=False`: file locks fail on DVS and on some NFS and Lustre mounts.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

import h5py
import numpy as np

from hpcinfer.errors import DataError, ResumableError

CHUNK_BYTES = 64 * 1024
"""Bytes in an HDF5 chunk of our columns: the unit of a checksum, so also of what one flipped bit costs."""

LIBVER = ("earliest", "v110")
"""Any h5dump or h5py of the last ten years reads what we write."""

READ_ERRORS = (OSError, KeyError, RuntimeError, ValueError, TypeError)
"""What h5py raises while opening objects in a damaged file (found by flipping bytes)."""

_MOST_LISTED = 40

Interval = tuple[int, int]
"""Half-open range of elements."""


def open_input(path: str | os.PathLike) -> h5py.File:
    """Opens an HDF5 file for reading.

    Raises:
        DataError: no such file, not a file, no permission, not HDF5, truncated.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise DataError(f"{path} is a folder", fix="name an HDF5 file in it")
        # A plain open first: its errors say "no such file" and "permission denied" more plainly than HDF5's.
        with open(path, "rb") as file:
            if not file.read(1):
                raise DataError(f"{path} is empty", found="0 bytes", fix="an HDF5 file is needed")
        return h5py.File(path, "r", locking=False)
    except FileNotFoundError as error:
        raise DataError(f"no such file: {path}") from error
    except READ_ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        fix = "the file may be truncated, or of another format"
        if Path(path).suffix.lower() not in (".h5", ".hdf5"):
            fix += "; `hpcinfer convert` makes a prompts file of JSON Lines, CSV, Parquet and text"
        raise DataError(f"cannot open {path} as HDF5", found=reason, fix=fix) from error


def read_error(error: Exception, what: str) -> DataError | ResumableError:
    """Says whether a failed read is the file's fault (DataError) or the file system's (ResumableError)."""
    if "errno = " in str(error):
        return ResumableError(f"reading {what} failed", found=str(error), fix="start again when the disk is well")
    return DataError(f"cannot read {what}", found=str(error), fix="the file is damaged; write it again")


def is_checksum_error(error: Exception) -> bool:
    """True for a chunk whose filters (checksum, compression) refuse its bytes."""
    return isinstance(error, OSError) and "filter returned failure" in str(error)


def read_around_damage(dataset: h5py.Dataset, start: int, stop: int) -> tuple[np.ndarray, list[Interval]]:
    """Reads elements [start, stop) of the first axis; those in chunks that fail their checksum come back as zeros.

    Returns:
        The values, and the damaged intervals inside [start, stop), in dataset positions.
    Raises:
        DataError, ResumableError: nothing can be read for another reason.
    """
    name = f"{dataset.name} of {dataset.file.filename}"
    try:
        values = dataset[start:stop]
        _check_not_shrunk(dataset)
        return values, []
    except READ_ERRORS as error:
        if not is_checksum_error(error) or dataset.chunks is None:
            raise read_error(error, name) from error
    values = np.zeros((stop - start, *dataset.shape[1:]), dataset.dtype)
    damaged: list[Interval] = []
    step = dataset.chunks[0]
    for first in range(start - start % step, stop, step):
        low, high = max(first, start), min(first + step, stop)
        try:
            values[low - start : high - start] = dataset[low:high]
        except READ_ERRORS as error:
            if not is_checksum_error(error):
                raise read_error(error, name) from error
            damaged.append((low, high))
    return values, damaged


def _check_not_shrunk(dataset: h5py.Dataset) -> None:
    """HDF5 takes what lies behind the end of a file that was cut short after it was opened for zeros, with valid checksums."""
    file = dataset.file
    found = os.fstat(file.id.get_vfd_handle()).st_size
    if found < file.id.get_filesize():
        raise DataError(
            f"{file.filename} was cut short while it was read",
            found=f"{found} of {file.id.get_filesize()} bytes",
            fix="never change the prompts of a run that goes on; write them again",
        )


def list_datasets(file: h5py.File) -> list[str]:
    """Every dataset as "/name  shape dtype", the first forty; for messages that say what there is."""
    lines: list[str] = []

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> bool | None:
        if isinstance(item, h5py.Dataset):
            lines.append(f"/{name}  {describe_shape(item)}")
        return True if len(lines) > _MOST_LISTED else None  # anything but None ends the visit

    try:
        file.visititems(visit)
    except READ_ERRORS as error:
        lines.append(f"(the rest cannot be read: {error})")
    if len(lines) > _MOST_LISTED:
        lines[_MOST_LISTED:] = ["..."]
    return lines


def describe_shape(dataset: h5py.Dataset) -> str:
    """Shape and dtype in words, such as "[1000] int32" or "[1000] string (variable length)"."""
    info = h5py.check_string_dtype(dataset.dtype)
    if info is None:
        base = h5py.check_vlen_dtype(dataset.dtype)
        kind = str(dataset.dtype) if base is None else f"{base} (variable length)"
    else:
        kind = "string (variable length)" if info.length is None else f"string ({info.length} bytes)"
    shape = "scalar" if dataset.shape == () else "[" + ", ".join(str(n) for n in dataset.shape or ()) + "]"
    return f"{shape} {kind}"


def missing_dataset(file: h5py.File, name: str, problem: str = "") -> DataError:
    """The error for a dataset that is not there or not usable: it lists those that are."""
    there = list_datasets(file)
    return DataError(
        problem or f"no dataset {name!r} in {file.filename}",
        found="\n         ".join(there) if there else "no datasets at all",
        fix="name one of them as `dataset`, or convert the file",
    )


def refuse_to_replace(path: str | os.PathLike, sources: Iterable[str | os.PathLike]) -> None:
    """Raises DataError where `path` is one of the files, or lies in one of the folders, that are still to be read."""
    path = os.fspath(path)
    if not os.path.exists(path):
        return
    for source in map(os.fspath, sources):
        near = (os.path.dirname(path) or ".") if os.path.isdir(source) else path
        if os.path.exists(source) and os.path.samefile(source, near):
            raise DataError(f"{path} would replace what is read", found=f"it is of {source}", fix="give another name for the output")


@contextlib.contextmanager
def whole_file(path: str | os.PathLike, *, suffix: str = ".tmp") -> Iterator[Path]:
    """A temporary path beside `path`, to be created by the body; renamed to `path` when the body ends well.

    The file is fsynced before the rename and its folder after it, so that `path` is there either whole or not at all,
    also after a crash. When the body fails the temporary file is removed.

    Raises:
        DataError: the folder is missing, not writable or full; or `path` is a folder or a device.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a rename would put a plain file in the place of a device
        raise DataError(f"cannot write {path}", found="it is not a plain file", fix="give the path of a file")
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}{suffix}")
    done = False
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        done = True
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "free space, or give a path where there is more" if is_full else "give a path in a folder that you can write to"
        raise DataError(f"cannot write {path}", found=error.strerror or str(error), fix=fix) from error
    finally:
        if not done:
            with contextlib.suppress(OSError):
                temporary.unlink()
