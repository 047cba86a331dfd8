"""Opens prompts in any layout. What is found is decided here; each layout has a class of its own."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

import h5py

from hpcinfer.data.prompts import schema
from hpcinfer.data.prompts.foreign import (
    ATTENTION_MASK,
    INPUT_IDS,
    OneDatasetARowReader,
    PaddedReader,
    StringsReader,
    is_scalar_string,
    is_token_dataset,
    natural_order,
)
from hpcinfer.data.hdf5 import READ_ERRORS, missing_dataset, open_input
from hpcinfer.data.prompts.identity import check_identity, identity_of, prefix_fingerprint
from hpcinfer.data.prompts.native import PackedReader
from hpcinfer.data.prompts.prompt_row import PromptRow, PromptsReader, sampling_for
from hpcinfer.data.prompts.shards import ShardedReader
from hpcinfer.errors import DataError

__all__ = [
    "PromptRow",
    "PromptsReader",
    "check_identity",
    "input_identity",
    "open_prompts",
    "prefix_fingerprint",
    "sampling_for",
]

SUFFIXES = (".h5", ".hdf5")

PathLike = str | os.PathLike



def open_prompts(path: PathLike | Sequence[PathLike], dataset: str | None = None) -> PromptsReader:
    """Opens prompts for reading, without file locks.

    Args:
        path: a file, a folder of .h5 files, a glob pattern, or a list of files. A folder's and a glob's files are
            read in natural order of their names (part-2 before part-10), a list in its own order.
        dataset: where the prompts are, for files that are not ours: a dataset of strings, `input_ids`, a group with
            data and offsets, or a group with one dataset a row (never guessed: too much looks like that). Without it
            the only candidate is taken; several are an error that lists them.
    Raises:
        DataError: nothing there, not HDF5, truncated, wrong dtypes, no such dataset (those that exist are listed).
    """
    files = prompt_files(path)
    if len(files) == 1:
        return _open_file(files[0], dataset)
    return ShardedReader(files, lambda one: _open_file(one, dataset))


def prompt_files(path: PathLike | Sequence[PathLike]) -> list[str]:
    """The files that `path` stands for, in row order. Raises DataError when there are none."""
    if not isinstance(path, str | os.PathLike):
        files = [os.fspath(one) for one in path]
        if not files:
            raise DataError("the list of prompts files is empty")
        return files
    text = os.fspath(path)
    if os.path.isdir(text):
        if os.path.exists(os.path.join(text, "run.json")):
            raise DataError(f"{text} is a run directory, not prompts", fix="name the prompts file")
        files = [entry.path for entry in os.scandir(text) if entry.name.endswith(SUFFIXES) and entry.name[0] != "."]
        if not files:
            raise DataError(f"no prompts in the folder {text}", fix=f"its files must end in {' or '.join(SUFFIXES)}")
    elif not os.path.exists(text) and glob.has_magic(text):
        files = [one for one in glob.glob(text) if os.path.isfile(one)]
        if not files:
            raise DataError(f"no file matches {text}")
    else:
        return [text]
    return sorted(files, key=lambda one: natural_order(Path(one).name))


def input_identity(path: PathLike | Sequence[PathLike], dataset: str | None = None) -> dict:
    """What `identity.identity_of` says of the prompts at `path`; see there."""
    with open_prompts(path, dataset) as reader:
        return identity_of(reader)


def _open_file(path: str, dataset: str | None) -> PromptsReader:
    file = open_input(path)
    try:
        reader = _reader_of(file, dataset)
    except READ_ERRORS as error:
        file.close()
        raise DataError(f"{path} is damaged", found=str(error), fix="write it again") from error
    except DataError:
        file.close()
        raise
    return reader


def _reader_of(file: h5py.File, name: str | None) -> PromptsReader:
    if name is not None:
        if name not in file:
            raise missing_dataset(file, name)
        reader = _layout_of(file, file[name])
        if reader is None:
            raise missing_dataset(file, name, f"{name!r} of {file.filename} does not hold prompts")
        return reader
    if _is_packed(file.get(schema.PROMPTS_GROUP)):
        return PackedReader(file, file[schema.PROMPTS_GROUP])
    if file.attrs.get("format") is not None and str(file.attrs["format"]).startswith("hpcinfer-"):
        raise missing_dataset(file, schema.PROMPTS_GROUP, f"{file.filename} is {file.attrs['format']}, not prompts")
    candidates = _candidates(file)
    if len(candidates) == 1:
        reader = _layout_of(file, file[candidates[0]])
        if reader is None:
            raise missing_dataset(
                file, candidates[0], f"{candidates[0]!r} of {file.filename} has the name of prompts, but not their dtype"
            )
        return reader
    if candidates:
        raise DataError(
            f"{file.filename} has {len(candidates)} datasets that may be the prompts",
            found=", ".join(candidates[:20]),
            fix=f"say which one with data.dataset, or --dataset: {candidates[0]!r}, for example",
        )
    raise missing_dataset(file, "", f"{file.filename} holds nothing that looks like prompts")


def _layout_of(file: h5py.File, item: h5py.Group | h5py.Dataset) -> PromptsReader | None:
    if isinstance(item, h5py.Group):
        if _is_packed(item):
            return PackedReader(file, item)
        if isinstance(item.get(INPUT_IDS), h5py.Dataset):
            return PaddedReader(file, item[INPUT_IDS], item.get(ATTENTION_MASK))
        return OneDatasetARowReader(file, item) if _is_row_group(item) else None
    if _is_strings(item) or (item.ndim == 1 and h5py.check_vlen_dtype(item.dtype) is not None):
        return StringsReader(file, item)
    if item.ndim == 2 and item.dtype.kind in "iu":
        return PaddedReader(file, item, item.parent.get(ATTENTION_MASK))
    if item.name.endswith(f"/{schema.DATA}") and _is_packed(item.parent):
        return PackedReader(file, item.parent)
    return None


def _candidates(file: h5py.File) -> list[str]:
    """Names of everything without which nobody would call it prompts: packed groups, strings, `input_ids`."""
    found: list[str] = []

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Group):
            if _is_packed(item):
                found.append(name)
        elif _is_strings(item) or (item.name.endswith(f"/{INPUT_IDS}") and item.ndim == 2):
            found.append(name)

    if _is_packed(file):
        return ["/"]
    file.visititems(visit)
    return found


def _is_packed(item: object) -> bool:
    return (
        isinstance(item, h5py.Group)
        and isinstance(item.get(schema.DATA), h5py.Dataset)
        and isinstance(item.get(schema.OFFSETS), h5py.Dataset)
    )


def _is_strings(item: h5py.Dataset) -> bool:
    return item.ndim == 1 and h5py.check_string_dtype(item.dtype) is not None


def _is_row_group(group: h5py.Group) -> bool:
    """Whether the first few members are scalar strings, or rows of token ids."""
    members = [group[name] for name, _ in zip(group, range(4), strict=False)]
    return bool(members) and (all(map(is_scalar_string, members)) or all(map(is_token_dataset, members)))
