"""Generations as columns in memory: what a segment, a compaction and a merge work on.

Shapes: R rows. Scalar columns are arrays [R]; a ragged column is `data` with `offsets` int64 [R + 1], the values of
row i being `data[offsets[i]:offsets[i + 1]]`. Beside the columns that every table has, it may have optional ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from hpcinfer.data.optional_columns import (
    OPTIONAL_COLUMNS, OPTIONAL_OFFSETS, OPTIONAL_RAGGED, OPTIONAL_SCALARS, missing_value, of_row, values_of,
)
from hpcinfer.request import FinishReason, Generation, Status

SCALAR_COLUMNS = {
    "row": np.dtype("u8"),
    "sample": np.dtype("u2"),
    "finish_reason": np.dtype("u1"),
    "n_prompt_tokens": np.dtype("i4"),
    "n_output_tokens": np.dtype("i4"),
    "status": np.dtype("u1"),
}
RAGGED_COLUMNS = {"text": np.dtype("u1"), "token_ids": np.dtype("i4"), "error": np.dtype("u1")}
OFFSET_COLUMNS = {"text": "text_offsets", "token_ids": "token_offsets", "error": "error_offsets", **OPTIONAL_OFFSETS}
"""Ragged column -> the data set with its offsets, int64 [n + 1]."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ragged:
    """Values of different lengths, packed."""

    data: np.ndarray
    offsets: np.ndarray
    """int64 [R + 1], from 0, never falling."""

    @staticmethod
    def pack(values: Sequence[bytes] | Sequence[np.ndarray], dtype: np.dtype) -> Ragged:
        """From bytes (dtype u1) or 1-D arrays, one a row."""
        offsets = np.zeros(len(values) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, values), np.int64, len(values)), out=offsets[1:])
        if not len(values):
            return Ragged(np.empty(0, dtype), offsets)
        if isinstance(values[0], bytes):
            return Ragged(np.frombuffer(b"".join(values), dtype), offsets)
        return Ragged(np.concatenate(values).astype(dtype, copy=False), offsets)

    @staticmethod
    def nothing(num_rows: int, dtype: np.dtype) -> Ragged:
        """Rows without values."""
        return Ragged(np.empty(0, dtype), np.zeros(num_rows + 1, np.int64))

    @property
    def lengths(self) -> np.ndarray:
        """int64 [R]."""
        return np.diff(self.offsets)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.data[self.offsets[index]:self.offsets[index + 1]]

    def take(self, indices: np.ndarray) -> Ragged:
        """The rows at `indices`, in that order."""
        lengths = self.lengths[indices]
        offsets = np.zeros(len(indices) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        out = np.empty(int(offsets[-1]), self.data.dtype)
        # One copy a run of neighbours: sorted files make these runs long.
        if len(indices):
            breaks = np.flatnonzero(np.diff(indices) != 1) + 1
            firsts = np.concatenate(([0], breaks))
            lasts = np.concatenate((breaks, [len(indices)])) - 1
            source_starts = self.offsets[indices[firsts]].tolist()
            source_stops = self.offsets[indices[lasts] + 1].tolist()
            for target, start, stop in zip(offsets[firsts].tolist(), source_starts, source_stops, strict=True):
                out[target:target + stop - start] = self.data[start:stop]
        return Ragged(out, offsets)

    @staticmethod
    def concatenate(parts: Sequence[Ragged]) -> Ragged:
        """The rows of all parts, one part after the other; at least one part."""
        offsets = np.zeros(sum(len(part.offsets) - 1 for part in parts) + 1, np.int64)
        np.cumsum(np.concatenate([part.lengths for part in parts]), out=offsets[1:])
        return Ragged(np.concatenate([part.data for part in parts]), offsets)


@dataclasses.dataclass(frozen=True, slots=True)
class GenerationTable:
    """Some generations, in columns of the dtypes of `SCALAR_COLUMNS` and `RAGGED_COLUMNS`."""

    row: np.ndarray
    sample: np.ndarray
    finish_reason: np.ndarray
    n_prompt_tokens: np.ndarray
    n_output_tokens: np.ndarray
    status: np.ndarray
    text: Ragged
    token_ids: Ragged
    error: Ragged
    optional: Mapping[str, np.ndarray | Ragged] = dataclasses.field(default_factory=dict)
    """Those of the `OPTIONAL_COLUMNS` that it has, by name."""

    def __len__(self) -> int:
        return len(self.row)

    def optional_column(self, name: str) -> np.ndarray | Ragged:
        """An optional column, filled where the table has none."""
        if name in self.optional:
            return self.optional[name]
        if name in OPTIONAL_RAGGED:
            return Ragged.nothing(len(self), OPTIONAL_RAGGED[name])
        return np.full(len(self), missing_value(name), OPTIONAL_SCALARS[name])

    @staticmethod
    def from_generations(generations: Sequence[Generation]) -> GenerationTable:
        """Rows in the order given. Text that is not valid Unicode (lone surrogates) has these replaced by "?"."""
        count = len(generations)

        def scalars(name: str, values: Iterator[int]) -> np.ndarray:
            return np.fromiter(values, SCALAR_COLUMNS[name], count)

        return GenerationTable(
            row=scalars("row", (g.row for g in generations)),
            sample=scalars("sample", (g.sample for g in generations)),
            finish_reason=scalars("finish_reason", (int(g.finish_reason) for g in generations)),
            n_prompt_tokens=scalars("n_prompt_tokens", (g.num_prompt_tokens for g in generations)),
            n_output_tokens=scalars("n_output_tokens", (len(g.token_ids) for g in generations)),
            status=scalars("status", (int(g.status) for g in generations)),
            text=Ragged.pack([g.text.encode("utf-8", "replace") for g in generations], RAGGED_COLUMNS["text"]),
            token_ids=Ragged.pack(
                [np.asarray(g.token_ids, np.int32) for g in generations], RAGGED_COLUMNS["token_ids"]
            ),
            error=Ragged.pack([g.error.encode("utf-8", "replace") for g in generations], RAGGED_COLUMNS["error"]),
            optional={
                name: Ragged.pack(values, OPTIONAL_RAGGED[name]) if name in OPTIONAL_RAGGED
                else np.array(values, OPTIONAL_SCALARS[name])
                for name, values in values_of(generations).items()
            },
        )

    def generations(self) -> Iterator[Generation]:
        """Each row as a Generation; its token_ids are a copy, so that a kept row does not keep the table."""
        columns = [getattr(self, name).tolist() for name in SCALAR_COLUMNS]
        for i, (row, sample, reason, num_prompt, _, status) in enumerate(zip(*columns, strict=True)):
            yield Generation(
                row=row,
                sample=sample,
                status=Status(status),
                finish_reason=FinishReason(reason),
                token_ids=self.token_ids[i].copy(),
                text=self.text[i].tobytes().decode("utf-8", "replace"),
                num_prompt_tokens=num_prompt,
                error=self.error[i].tobytes().decode("utf-8", "replace"),
                **(of_row({name: column[i] for name, column in self.optional.items()}) if self.optional else {}),
            )

    def take(self, indices: np.ndarray) -> GenerationTable:
        """The rows at `indices` (int64), in that order."""
        scalars = {name: getattr(self, name)[indices] for name in SCALAR_COLUMNS}
        ragged = {name: getattr(self, name).take(indices) for name in RAGGED_COLUMNS}
        optional = {
            name: column.take(indices) if isinstance(column, Ragged) else column[indices]
            for name, column in self.optional.items()
        }
        return GenerationTable(**scalars, **ragged, optional=optional)

    @staticmethod
    def concatenate(tables: Sequence[GenerationTable]) -> GenerationTable:
        """All rows, table after table; at least one table."""
        if len(tables) == 1:
            return tables[0]
        scalars = {name: np.concatenate([getattr(t, name) for t in tables]) for name in SCALAR_COLUMNS}
        ragged = {name: Ragged.concatenate([getattr(t, name) for t in tables]) for name in RAGGED_COLUMNS}
        optional = {}
        for name in OPTIONAL_COLUMNS:
            if any(name in table.optional for table in tables):
                parts = [table.optional_column(name) for table in tables]
                optional[name] = Ragged.concatenate(parts) if name in OPTIONAL_RAGGED else np.concatenate(parts)
        return GenerationTable(**scalars, **ragged, optional=optional)

    def sorted(self) -> GenerationTable:
        """By (row, sample); rows of one key keep their order."""
        order = np.lexsort((self.sample, self.row))
        if np.array_equal(order, np.arange(len(self))):
            return self
        return self.take(order)

    def deduplicated(self) -> GenerationTable:
        """Sorted by (row, sample), one row a key: ok beats failed beats partial; of two partials the longer one (its
        tokens begin with the other's); then the one that stands first in this table. Callers put the tables of lower
        (writer, sequence) first.
        """
        shorter = np.where(self.status == Status.PARTIAL, -self.n_output_tokens.astype(np.int64), 0)
        order = np.lexsort((np.arange(len(self)), shorter, self.status, self.sample, self.row))
        rows, samples = self.row[order], self.sample[order]
        first = np.ones(len(order), bool)
        first[1:] = (rows[1:] != rows[:-1]) | (samples[1:] != samples[:-1])
        return self.take(order[first])
