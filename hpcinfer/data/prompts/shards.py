"""Several prompts files read as one, rows numbered through in the order of the files."""

from __future__ import annotations

import bisect
import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from hpcinfer.data.prompts.prompt_row import PromptRow, PromptsReader
from hpcinfer.errors import DataError

_MOST_OPEN = 8
"""Files kept open at once; thousands of shards must not need thousands of file handles."""


class ShardedReader(PromptsReader):
    """Several files, each in any layout of its own; all text or all token ids.

    Args:
        paths: the files in row order.
        open_one: opens one of them.
    Raises:
        DataError: text and token ids are mixed, or a file cannot be read.
    """

    def __init__(self, paths: Sequence[str], open_one: Callable[[str], PromptsReader]) -> None:
        self.paths = tuple(paths)
        self._open_one = open_one
        self._open: collections.OrderedDict[int, PromptsReader] = collections.OrderedDict()
        self._first_rows = [0]
        layouts = set()
        for index, path in enumerate(self.paths):
            reader = self._shard(index)
            if index == 0:
                self.kind = reader.kind
            elif reader.kind != self.kind:
                self.close()
                raise DataError(
                    "prompts of two kinds cannot be one input",
                    found=f"{self.kind} in {self.paths[0]}, {reader.kind} in {path}",
                    fix="run them as two jobs",
                )
            self._first_rows.append(self._first_rows[-1] + reader.num_rows)
            layouts.add(reader.layout)
        self.num_rows = self._first_rows[-1]
        self.layout = f"{len(self.paths)} shards of {' and '.join(sorted(layouts))}"

    def _shard(self, index: int) -> PromptsReader:
        if index not in self._open:
            self._open[index] = self._open_one(self.paths[index])
            if self.continuation:
                self._open[index].read_continuations(self.continuation)
            if len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(index)
        return self._open[index]

    def read_continuations(self, name: str) -> None:
        """As of every shard."""
        for index in range(len(self.paths)):
            self._shard(index).read_continuations(name)
        self.continuation = name

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """(shard, its first row, start and stop inside it) for every shard that rows [start, stop) touch."""
        index = bisect.bisect_right(self._first_rows, start) - 1
        while start < stop:
            first, end = self._first_rows[index], self._first_rows[index + 1]
            if start < end:
                last = min(stop, end)
                yield index, first, start - first, last - first
                start = last
            index += 1

    def _rows(self, start: int, stop: int) -> Iterator[PromptRow]:
        for index, first, low, high in self._parts(start, stop):
            for row in self._shard(index).rows(low, high):
                yield row._replace(row=first + row.row)

    def _ids(self, start: int, stop: int) -> Iterator[str | None]:
        for index, _, low, high in self._parts(start, stop):
            yield from self._shard(index).ids(low, high)

    def meta_names(self) -> tuple[str, ...]:
        """Names of the meta columns of any shard, in the order of the shards."""
        names: dict[str, None] = {}
        for index in range(len(self.paths)):
            names.update(dict.fromkeys(self._shard(index).meta_names()))
        return tuple(names)

    def _meta(self, name: str, start: int, stop: int) -> Iterator[Any]:
        for index, _, low, high in self._parts(start, stop):
            yield from self._shard(index).meta(name, low, high)

    def fingerprint_of(self, num_rows: int) -> str:
        """The fingerprints of the shards' parts, one after the other; "" where any shard has none."""
        parts = [self._shard(index).fingerprint_of(high) for index, _, _, high in self._parts(0, num_rows)]
        return ";".join(parts) if all(parts) else ""

    def offsets_sample(self, num_rows: int) -> Iterator[np.ndarray]:
        """The number of rows of each shard that the first `num_rows` rows touch."""
        yield np.array([high for _, _, _, high in self._parts(0, num_rows)], "<i8")

    def close(self) -> None:
        """Closes the files that are open."""
        while self._open:
            self._open.popitem()[1].close()
