"""Reads packed prompts: files of version 1, and files that have no more than `data` and `offsets`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import h5py
import numpy as np

from hpcinfer.data.prompts import schema
from hpcinfer.data.prompts.fingerprint import BLOCK_ROWS as CHAIN_ROWS
from hpcinfer.data.prompts.fingerprint import DIGEST_BYTES, FingerprintChain
from hpcinfer.data.hdf5 import READ_ERRORS, describe_shape, missing_dataset, read_around_damage
from hpcinfer.data.prompts.packed import BLOCK_ROWS, PackedBlock, PackedColumn
from hpcinfer.data.prompts.prompt_row import NO_OVERRIDES, PromptRow, PromptsReader, text_row, token_row
from hpcinfer.errors import ConfigError, DataError

_SAMPLED_OFFSET_BLOCKS = 128
_OFFSET_BLOCK = 8192


class PackedReader(PromptsReader):
    """Prompts as a packed column, with ids and per-row sampling values where there are any.

    Args:
        file: the open file; the reader closes it.
        group: the group that holds `data` and `offsets`.
    Raises:
        DataError: wrong dtypes, or columns whose lengths do not fit each other.
    """

    def __init__(self, file: h5py.File, group: h5py.Group) -> None:
        self._file = file
        self.paths = (file.filename,)
        data, offsets = group[schema.DATA], group[schema.OFFSETS]
        self.layout = "packed"
        self.kind = _kind_of(data)
        self._column = PackedColumn(data, offsets)
        self.num_rows = self._column.num_rows
        self._overrides: dict[str, _OverrideColumn] = {}
        self._continuations: PackedColumn | None = None
        self._id: PackedColumn | h5py.Dataset | None = None
        self._meta_groups: dict[str, h5py.Group] = {}
        self._fingerprint = ""
        self._digests: h5py.Dataset | None = None
        # A pair that lies deeper than /prompts is somebody's own layout; names at the root mean nothing there.
        if group.name == f"/{schema.PROMPTS_GROUP}":
            self._read_header()
            self._find_columns()

    def _read_header(self) -> None:
        attrs = self._file.attrs
        if _text_attr(attrs, "format") != schema.PROMPTS_FORMAT:
            return
        self.layout = f"prompts v{schema.PROMPTS_VERSION}"
        version = attrs.get("version", schema.PROMPTS_VERSION)
        if version != schema.PROMPTS_VERSION:
            raise DataError(
                f"{self.paths[0]} has version {version}", found=f"this program reads version {schema.PROMPTS_VERSION}"
            )
        stated = attrs.get("n_rows", self.num_rows)
        if stated != self.num_rows:
            raise DataError(
                f"{self.paths[0]} does not hold what it says",
                found=f"n_rows = {stated}, offsets for {self.num_rows} rows",
                fix="the file was changed after it was written; convert it again",
            )
        digests = self._file.get(schema.DIGESTS)
        if isinstance(digests, h5py.Dataset) and digests.shape == (self.num_rows // CHAIN_ROWS, DIGEST_BYTES):
            self._digests = digests
        # Of use only with its chain: a fingerprint of another making cannot be told for a first part of the rows.
        stated = _text_attr(attrs, "fingerprint")
        if stated.startswith("sha256:") and (self._digests is not None or self.num_rows < CHAIN_ROWS):
            self._fingerprint = stated

    def _find_columns(self) -> None:
        for name, column in schema.SAMPLING_COLUMNS.items():
            if name in self._file:
                self._overrides[name] = _OverrideColumn(self._file[name], column, self.num_rows)
        if schema.ID in self._file:
            item = self._file[schema.ID]
            self._id = packed_column(item, self.num_rows) if isinstance(item, h5py.Group) else item
            if isinstance(item, h5py.Dataset) and item.shape != (self.num_rows,):
                raise _length_error(item, self.num_rows)
        meta = self._file.get(schema.META)
        if isinstance(meta, h5py.Group):
            groups = {schema.key_of_column(name): meta[name] for name in meta}
            self._meta_groups = {name: item for name, item in groups.items() if isinstance(item, h5py.Group)}

    def read_continuations(self, name: str) -> None:
        """Those of `/meta/NAME`, each a JSON value: a text, or a list of token ids, as the prompts are."""
        group = self._file.get(f"{schema.META}/{schema.column_name(name)}")
        if self._column.data.parent.name != f"/{schema.PROMPTS_GROUP}" or not isinstance(group, h5py.Group):
            super().read_continuations(name)
        self._continuations = packed_column(group, self.num_rows)
        self.continuation = name

    def _rows(self, start: int, stop: int) -> Iterator[PromptRow]:
        rows = self._plain_rows(start, stop)
        if self._continuations is None:
            yield from rows
            return
        problems: dict[int, str] = {}
        for row, raw in zip(rows, packed_bytes(self._continuations, start, stop, problems), strict=True):
            yield _continued(row, self.kind, raw, problems.get(row.row))

    def _plain_rows(self, start: int, stop: int) -> Iterator[PromptRow]:
        for block in self._column.blocks(start, stop):
            overrides, bad = self._read_overrides(block.first_row, block.first_row + len(block))
            if bad:
                block.problems = bad | block.problems
            yield from _text_rows(block, overrides) if self.kind == schema.TEXT else _token_rows(block, overrides)

    def _read_overrides(self, start: int, stop: int) -> tuple[list[Mapping[str, Any]] | None, dict[int, str]]:
        problems: dict[int, str] = {}
        if not self._overrides:
            return None, problems
        rows: list[Mapping[str, Any]] = [NO_OVERRIDES] * (stop - start)
        for name, column in self._overrides.items():
            for index, value in column.given(start, stop, problems):
                if rows[index] is NO_OVERRIDES:
                    rows[index] = {}
                rows[index][name] = value
        return rows, problems

    def _ids(self, start: int, stop: int) -> Iterator[str | None]:
        if self._id is None:
            yield from super()._ids(start, stop)
        elif isinstance(self._id, PackedColumn):
            yield from (raw.decode(errors="replace") or None for raw in packed_bytes(self._id, start, stop))
        else:
            for first in range(start, stop, BLOCK_ROWS):
                values, _ = read_around_damage(self._id, first, min(first + BLOCK_ROWS, stop))
                for value in values.tolist():
                    yield value.decode(errors="replace") if isinstance(value, bytes) else str(value)

    def meta_names(self) -> tuple[str, ...]:
        """Names of the columns under /meta."""
        return tuple(self._meta_groups)

    def _meta(self, name: str, start: int, stop: int) -> Iterator[Any]:
        if name not in self._meta_groups:
            yield from super()._meta(name, start, stop)
            return
        # Opened when asked for: nothing but an export reads them.
        for raw in packed_bytes(packed_column(self._meta_groups[name], self.num_rows), start, stop):
            yield _json_value(raw)

    def fingerprint_of(self, num_rows: int) -> str:
        """The fingerprint of the first rows, from the stored digests and at most 1023 rows read; "" without them."""
        if num_rows == self.num_rows or not self._fingerprint:
            return self._fingerprint
        blocks = num_rows // CHAIN_ROWS
        digest = b"" if not blocks else read_around_damage(self._digests, blocks - 1, blocks)[0].tobytes()
        chain = FingerprintChain(self.kind, num_rows=blocks * CHAIN_ROWS, digest=digest)
        for row in self._plain_rows(chain.num_rows, num_rows):
            if row.error is not None:
                return ""
            chain.add(row.text.encode() if row.text is not None else row.token_ids.tobytes(), row.overrides)
        return chain.value()

    def offsets_sample(self, num_rows: int) -> Iterator[np.ndarray]:
        """All offsets of small files; else 128 evenly spaced blocks of 8192. Running sums show changes between them."""
        blocks = -(-(num_rows + 1) // _OFFSET_BLOCK)
        for number in sorted({round(x) for x in np.linspace(0, blocks - 1, min(blocks, _SAMPLED_OFFSET_BLOCKS))}):
            low = number * _OFFSET_BLOCK
            values, _ = read_around_damage(self._column.offsets, low, min(low + _OFFSET_BLOCK, num_rows + 1))
            yield values.astype("<i8")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class _OverrideColumn:
    """One field of SamplingParams per row."""

    def __init__(self, item: h5py.Group | h5py.Dataset, column: schema.SamplingColumn, num_rows: int) -> None:
        self.name = column.name
        self._packed = packed_column(item, num_rows) if isinstance(item, h5py.Group) else None
        self._dataset = item
        if (column.dtype == "json") != (self._packed is not None):
            wanted = "a group with data and offsets (JSON)" if column.dtype == "json" else "a column of numbers"
            raise DataError(f"/{self.name} of {item.file.filename} is not {wanted}", fix="see datasets/PROMPTS.md")
        if self._packed is None:
            if item.shape != (num_rows,):
                raise _length_error(item, num_rows)
            if item.dtype.kind not in "iufb":
                raise DataError(f"/{self.name} of {item.file.filename} is not numbers", found=describe_shape(item))
            self._not_given = item.attrs.get(schema.NOT_GIVEN)
            self._is_bool = column.dtype == "i1"
            # Whole numbers for an integer field and floats for a float field need no look at each value.
            self._plain = (column.dtype, item.dtype.kind) in (("i8", "i"), ("f8", "f"))

    def given(self, start: int, stop: int, problems: dict[int, str]) -> Iterator[tuple[int, Any]]:
        """Yields (index in the range, value) of the rows that give one; adds to `problems` those that are bad."""
        if self._packed is not None:
            for index, raw in enumerate(packed_bytes(self._packed, start, stop, problems)):
                if raw:
                    yield from self._checked(index, start + index, raw, problems)
            return
        values, damaged = read_around_damage(self._dataset, start, stop)
        given = np.ones(len(values), bool) if self._not_given is None else values != self._not_given
        for low, high in damaged:
            given[low - start : high - start] = False
            for row in range(low, high):
                problems[row] = f"a chunk of /{self.name} that this row lies in fails its checksum"
        indices = np.flatnonzero(given)
        pairs = zip(indices.tolist(), values[indices].tolist(), strict=True)
        if self._plain and not np.isnan(values[indices]).any():
            yield from pairs
            return
        for index, value in pairs:
            if self._is_bool and value in (0, 1):
                value = bool(value)
            yield from self._checked(index, start + index, value, problems)

    def _checked(self, index: int, row: int, value: Any, problems: dict[int, str]) -> Iterator[tuple[int, Any]]:
        try:
            if isinstance(value, bytes):
                value = json.loads(value)
            elif value != value:
                raise ConfigError(f"sampling.{self.name} is NaN")
            yield index, schema.sampling_value(self.name, value)
        except (ConfigError, ValueError, RecursionError) as error:
            problems[row] = schema.one_line(error)


def _text_rows(block: PackedBlock, overrides: list[Mapping[str, Any]] | None) -> Iterator[PromptRow]:
    raw = block.data.tobytes()
    numbers = itertools.count(block.first_row)
    bounds = zip(numbers, block.starts.tolist(), block.stops.tolist(), overrides or itertools.repeat(NO_OVERRIDES))
    problems = block.problems
    if raw.isascii():
        # Slices of one string: half the time of decoding each row.
        text = raw.decode("ascii")
        if not problems and (block.starts < block.stops).all():
            for row, low, high, given in bounds:
                yield PromptRow(row, text[low:high], None, given)
            return
        for row, low, high, given in bounds:
            if low < high and row not in problems:
                yield PromptRow(row, text[low:high], None, given)
            else:
                yield PromptRow(row, error=problems.get(row, "the prompt is empty"))
        return
    for row, low, high, given in bounds:
        yield PromptRow(row, error=problems[row]) if row in problems else text_row(row, raw[low:high], given)


def _token_rows(block: PackedBlock, overrides: list[Mapping[str, Any]] | None) -> Iterator[PromptRow]:
    data = block.data
    clean = bool(len(data) == 0 or (data.min() >= 0 and data.max() <= schema.MAX_TOKEN_ID))
    if clean:
        data = data.astype(np.int32, copy=False)
    numbers = itertools.count(block.first_row)
    bounds = zip(numbers, block.starts.tolist(), block.stops.tolist(), overrides or itertools.repeat(NO_OVERRIDES))
    for row, low, high, given in bounds:
        if row in block.problems:
            yield PromptRow(row, error=block.problems[row])
        elif clean and low < high:
            # A copy: a view would keep the whole block alive for as long as one row of it runs.
            yield PromptRow(row, None, data[low:high].copy(), given)
        else:
            yield token_row(row, data[low:high], given)


def _continued(row: PromptRow, kind: str, raw: bytes, problem: str | None) -> PromptRow:
    """A row with its continuation, which is stored as JSON."""
    if row.error is not None:
        return row
    try:
        value = json.loads(raw) if raw and problem is None else None
    except (ValueError, RecursionError):
        problem = "the continuation is not valid JSON"
    else:
        if kind == schema.TEXT and isinstance(value, str) and value:
            return row._replace(continuation=value)
        is_ids = isinstance(value, list) and all(type(item) is int and 0 <= item <= schema.MAX_TOKEN_ID for item in value)
        if kind == schema.TOKEN_IDS and is_ids and value:
            return row._replace(continuation=np.array(value, np.int32))
        wanted = "a text" if kind == schema.TEXT else "a list of token ids"
        problem = problem or ("the row has no continuation" if value is None else f"the continuation is not {wanted}, or empty")
    return PromptRow(row.row, error=problem)


def packed_column(group: h5py.Group, num_rows: int) -> PackedColumn:
    """The packed text column in `group`. Raises DataError when it is none, or not of `num_rows` rows."""
    try:
        column = PackedColumn(group[schema.DATA], group[schema.OFFSETS])
    except READ_ERRORS as error:
        raise missing_dataset(group.file, group.name, f"{group.name} is not a packed column") from error
    if column.num_rows != num_rows:
        raise _length_error(column.offsets, num_rows)
    return column


def packed_bytes(
    column: PackedColumn, start: int, stop: int, problems: dict[int, str] | None = None
) -> Iterator[bytes]:
    """Yields the raw bytes of rows [start, stop); damaged rows are empty and reported in `problems`."""
    for block in column.blocks(start, stop):
        raw = block.data.tobytes()
        if problems is not None:
            problems.update(block.problems)
        for row, low, high in zip(
            itertools.count(block.first_row), block.starts.tolist(), block.stops.tolist(), strict=False
        ):
            yield b"" if row in block.problems else raw[low:high]


def _json_value(raw: bytes) -> Any:
    """The value of a meta column; what is not JSON, in a file of another making, is text."""
    try:
        return json.loads(raw) if raw else None
    except (ValueError, RecursionError):
        return raw.decode(errors="replace")


def _kind_of(data: h5py.Dataset) -> str:
    if data.dtype == np.uint8:
        return schema.TEXT
    if data.dtype.kind in "iu" and data.dtype.itemsize > 1:
        return schema.TOKEN_IDS
    raise DataError(
        f"{data.name} of {data.file.filename} holds no prompts",
        found=describe_shape(data),
        fix="prompts are uint8 (UTF-8 text) or int32 (token ids)",
    )


def _length_error(dataset: h5py.Dataset, num_rows: int) -> DataError:
    return DataError(
        f"{dataset.name} of {dataset.file.filename} does not fit the prompts",
        found=f"{describe_shape(dataset)} for {num_rows} rows",
        fix="every column has one value a row (offsets one more)",
    )


def _text_attr(attrs: h5py.AttributeManager, name: str) -> str:
    value = attrs.get(name, "")
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
