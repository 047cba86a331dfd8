"""Sorting records of any number: sorted runs on disk, merged. Memory holds one run, whatever the size of the input."""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hpcinfer.data.convert.base import Record
from hpcinfer.data.prompts.schema import encode_json
from hpcinfer.errors import DataError, RowError

PREFIX = "prefix"
"""Rows that begin alike become neighbours, so that their common part may be computed once."""
LENGTH = "length"
"""Longest first, so that no long row is left alone at the end of a run."""
ORDERS = (PREFIX, LENGTH)

SOURCE_ROW = "source_row"
"""The meta column with the row number that a row would have without sorting."""

_RUN_BYTES = 64 << 20
_MOST_RUNS = 64
# About what a record takes in memory beside its text.
_RECORD_BYTES = 500
_Key = tuple[Any, int]


def _by_prefix(record: Record) -> Any:
    return record.prompt.tolist() if isinstance(record.prompt, np.ndarray) else record.prompt


def _by_length(record: Record) -> Any:
    return -len(record.prompt)


_KEYS: dict[str, Callable[[Record], Any]] = {PREFIX: _by_prefix, LENGTH: _by_length}


class Sorter:
    """Takes records in any order and gives them back sorted; equal ones keep their order. A context manager.

    Args:
        order: "prefix" or "length" (characters of text, number of token ids).
        folder: where runs of about 64 MiB are kept meanwhile.
    Raises:
        DataError: the folder cannot be written.
    """

    def __init__(self, order: str, folder: str | os.PathLike, *, run_bytes: int = _RUN_BYTES) -> None:
        self._key = _KEYS[order]
        self._run_bytes = run_bytes
        self._held: list[tuple[_Key, int, Record]] = []
        self._held_bytes = 0
        self._count = 0
        self._runs: list[Path] = []
        self._stack = contextlib.ExitStack()
        with _write_errors(folder):
            self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix=".sort-", dir=folder)))

    def __enter__(self) -> Sorter:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, source: int, record: Record) -> None:
        """Takes one record; `source` is handed back with it. Its place becomes the meta value `source_row`.

        Raises RowError: the record's meta values are not JSON. DataError: they have a `source_row` already, or the folder cannot be
        written.
        """
        if record.meta and SOURCE_ROW in record.meta:
            raise DataError(
                f"sorted prompts keep their places in a column {SOURCE_ROW!r}, and the input has one that is to be kept",
                found=f"row {self._count}: {record.meta[SOURCE_ROW]!r}"[:200],
                fix="name the other columns with --meta-columns, or leave --sort out",
            )
        record = record._replace(meta={**(record.meta or {}), SOURCE_ROW: self._count})
        try:
            encode_json(record.meta)
        except (TypeError, ValueError, RecursionError) as error:
            raise RowError(f"the row's other columns cannot be stored: {error}") from error
        self._held.append(((self._key(record), self._count), source, record))
        self._count += 1
        size = len(record.prompt) * (1 if isinstance(record.prompt, str) else 8)
        self._held_bytes += 2 * size + len(record.raw) + _RECORD_BYTES
        if self._held_bytes >= self._run_bytes:
            with _write_errors(self._folder):
                self._spill()

    def _spill(self) -> None:
        self._held.sort(key=lambda entry: entry[0])
        self._write((key[1], source, record) for key, source, record in self._held)
        self._held, self._held_bytes = [], 0
        if len(self._runs) == _MOST_RUNS:
            # One run of all keeps the number of open files bounded.
            runs, self._runs = self._runs, []
            self._write((key[1], source, record) for key, source, record in self._merged(runs))
            for run in runs:
                run.unlink()

    def _write(self, entries: Iterator[tuple[int, int, Record]]) -> None:
        descriptor, name = tempfile.mkstemp(dir=self._folder)
        with open(descriptor, "w", encoding="ascii") as file:
            for place, source, record in entries:
                prompt = record.prompt.tolist() if isinstance(record.prompt, np.ndarray) else record.prompt
                file.write(json.dumps([place, source, record._replace(prompt=prompt)]) + "\n")
        self._runs.append(Path(name))

    def _read(self, run: Path) -> Iterator[tuple[_Key, int, Record]]:
        with open(run, encoding="ascii") as file:
            for line in file:
                place, source, fields = json.loads(line)
                record = Record(*fields)
                yield (self._key(record), place), source, record

    def _merged(self, runs: list[Path]) -> Iterator[tuple[_Key, int, Record]]:
        return heapq.merge(*map(self._read, runs), key=lambda entry: entry[0])

    def items(self) -> Iterator[tuple[int, Record]]:
        """(source, record) of all, sorted. Raises DataError."""
        self._held.sort(key=lambda entry: entry[0])
        with _write_errors(self._folder):
            if self._runs and self._held:
                self._spill()
        runs = self._merged(self._runs) if self._runs else iter(self._held)
        for _, source, record in runs:
            yield source, record


@contextlib.contextmanager
def _write_errors(folder: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"cannot sort in {folder}", found=reason, fix="check the folder, the free space and the quota") from error
