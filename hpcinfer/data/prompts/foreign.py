"""Reads prompts in layouts that other programs write. They have no per-row sampling values; `convert` adds those."""

from __future__ import annotations

import re
from collections.abc import Iterator

import h5py
import numpy as np

from hpcinfer.data.prompts import schema
from hpcinfer.data.hdf5 import READ_ERRORS, describe_shape, read_around_damage, read_error
from hpcinfer.data.prompts.packed import BLOCK_BYTES, BLOCK_ROWS, MAX_ROW_BYTES
from hpcinfer.data.prompts.prompt_row import PromptRow, PromptsReader, text_row, token_row
from hpcinfer.errors import DataError

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"

_FIRST_BLOCK_ROWS = 64


class _OneFile(PromptsReader):
    def __init__(self, file: h5py.File) -> None:
        self._file = file
        self.paths = (file.filename,)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class StringsReader(_OneFile):
    """A one-dimensional dataset of strings (variable or fixed length), or of variable-length token ids."""

    def __init__(self, file: h5py.File, dataset: h5py.Dataset) -> None:
        super().__init__(file)
        self._dataset = dataset
        self.num_rows = len(dataset)
        self._is_text = h5py.check_string_dtype(dataset.dtype) is not None
        self.layout = "strings" if self._is_text else "variable-length token ids"
        self.kind = schema.TEXT if self._is_text else schema.TOKEN_IDS

    def _rows(self, start: int, stop: int) -> Iterator[PromptRow]:
        num_rows = _FIRST_BLOCK_ROWS
        while start < stop:
            last = min(start + num_rows, stop)
            values, damaged = read_around_damage(self._dataset, start, last)
            num_bytes = 0
            for row, value in enumerate(values, start):
                num_bytes += len(value) if self._is_text else value.nbytes if isinstance(value, np.ndarray) else 0
                if any(low <= row < high for low, high in damaged):
                    yield PromptRow(row, error="a chunk of the data that this row lies in fails its checksum")
                elif self._is_text:
                    yield text_row(row, bytes(value))
                else:
                    yield token_row(row, np.atleast_1d(value))
            # Sizes of variable-length rows are known only once they are read: aim at BLOCK_BYTES from the last block.
            num_rows = min(max(BLOCK_BYTES * (last - start) // max(num_bytes, 1), 1), 2 * num_rows, BLOCK_ROWS)
            start = last


class PaddedReader(_OneFile):
    """Two-dimensional `input_ids`; `attention_mask` beside it says which are tokens (without one, all are)."""

    layout = "padded token ids"
    kind = schema.TOKEN_IDS

    def __init__(self, file: h5py.File, input_ids: h5py.Dataset, attention_mask: h5py.Dataset | None) -> None:
        super().__init__(file)
        for dataset in (input_ids, attention_mask):
            if dataset is not None and (dataset.ndim != 2 or dataset.dtype.kind not in "iub"):
                raise DataError(
                    f"{dataset.name} of {file.filename} is not a matrix of integers", found=describe_shape(dataset)
                )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise DataError(
                f"{INPUT_IDS} and {ATTENTION_MASK} of {file.filename} do not fit each other",
                found=f"{describe_shape(input_ids)} and {describe_shape(attention_mask)}",
            )
        self._input_ids = input_ids
        self._attention_mask = attention_mask
        self.num_rows, width = input_ids.shape
        row_bytes = max(width * input_ids.dtype.itemsize, 1)
        if row_bytes > MAX_ROW_BYTES:
            raise DataError(f"rows of {input_ids.name} are too long", found=f"{row_bytes} bytes, most {MAX_ROW_BYTES}")
        self._block_rows = min(max(BLOCK_BYTES // row_bytes, 1), BLOCK_ROWS)

    def _rows(self, start: int, stop: int) -> Iterator[PromptRow]:
        for first in range(start, stop, self._block_rows):
            last = min(first + self._block_rows, stop)
            ids, damaged = read_around_damage(self._input_ids, first, last)
            mask = None
            if self._attention_mask is not None:
                mask, more = read_around_damage(self._attention_mask, first, last)
                damaged = damaged + more
            for index, values in enumerate(ids):
                row = first + index
                if any(low <= row < high for low, high in damaged):
                    yield PromptRow(row, error="a chunk of the data that this row lies in fails its checksum")
                else:
                    yield token_row(row, values if mask is None else values[mask[index] != 0])


class OneDatasetARowReader(_OneFile):
    """A group with one dataset a sample: a scalar string, or one row of token ids. Rows in natural order of names."""

    layout = "one dataset a row"

    def __init__(self, file: h5py.File, group: h5py.Group) -> None:
        super().__init__(file)
        self._group = group
        self._names = sorted(group, key=natural_order)
        self.num_rows = len(self._names)
        first = group[self._names[0]]
        self.kind = schema.TEXT if h5py.check_string_dtype(first.dtype) is not None else schema.TOKEN_IDS

    def _ids(self, start: int, stop: int) -> Iterator[str | None]:
        yield from self._names[start:stop]

    def _rows(self, start: int, stop: int) -> Iterator[PromptRow]:
        for row in range(start, stop):
            yield self._row(row, self._names[row])

    def _row(self, row: int, name: str) -> PromptRow:
        try:
            item = self._group[name]
            if is_scalar_string(item) and self.kind == schema.TEXT:
                return text_row(row, bytes(item[()]))
            if self.kind == schema.TOKEN_IDS and is_token_dataset(item):
                if item.nbytes > MAX_ROW_BYTES:
                    return PromptRow(row, error=f"{item.name} has {item.nbytes} bytes; the most is {MAX_ROW_BYTES}")
                return token_row(row, item[()])
        except READ_ERRORS as error:
            if "errno = " in str(error):
                raise read_error(error, f"{self._group.name}/{name} of {self.paths[0]}") from error
            return PromptRow(row, error=f"{name}: {error}")
        return PromptRow(row, error=f"{name} is not a {'string' if self.kind == schema.TEXT else 'row of token ids'}")


def is_scalar_string(item: object) -> bool:
    """A dataset that is one string."""
    return isinstance(item, h5py.Dataset) and item.shape == () and h5py.check_string_dtype(item.dtype) is not None


def is_token_dataset(item: object) -> bool:
    """A one-dimensional dataset of integers; single bytes are no token ids."""
    return isinstance(item, h5py.Dataset) and item.ndim == 1 and item.dtype.kind in "iu" and item.dtype.itemsize > 1


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """Sort key in which part-2 comes before part-10."""
    parts = re.split(r"(\d+)", name)
    return [(1, int(part), "") if part.isascii() and part.isdigit() else (0, 0, part) for part in parts]
