"""A row of the prompts, and what every layout of prompts files offers."""

from __future__ import annotations

import abc
import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from hpcinfer.data.prompts import schema
from hpcinfer.data.prompts.packed import MAX_ROW_BYTES
from hpcinfer.errors import ConfigError, DataError, RowError
from hpcinfer.request import SamplingParams

NO_OVERRIDES: Mapping[str, Any] = types.MappingProxyType({})


class PromptRow(NamedTuple):
    """One prompt as it was read. Exactly one of text, token_ids and error is set."""

    row: int
    """Row number, from 0, over all shards."""
    text: str | None = None
    token_ids: np.ndarray | None = None
    """int32 [num_tokens], at least one, none negative; a copy that the caller owns."""
    overrides: Mapping[str, Any] = NO_OVERRIDES
    """SamplingParams fields that this row gives itself."""
    error: str | None = None
    """Why this row cannot be run. The rows around it are not affected."""
    continuation: str | np.ndarray | None = None
    """What is to follow the prompt, of its kind (text, or token ids as int32), where the reader was told to read it."""


def sampling_for(row: PromptRow, defaults: SamplingParams) -> SamplingParams:
    """The sampling of one row: the job's, with what the row overrides.

    Raises:
        RowError: the row's values are out of range, or the row itself could not be read.
    """
    if row.error is not None:
        raise RowError(row.error)
    if not row.overrides:
        return defaults
    try:
        return schema.apply_overrides(defaults, dict(row.overrides))
    except ConfigError as error:
        raise RowError(schema.one_line(error)) from error


def text_row(row: int, raw: bytes, overrides: Mapping[str, Any] = NO_OVERRIDES) -> PromptRow:
    """A row from UTF-8 bytes; empty, invalid or endless ones become an error row."""
    if not raw:
        return PromptRow(row, error="the prompt is empty")
    if len(raw) > MAX_ROW_BYTES:
        return PromptRow(row, error=f"the row has {len(raw)} bytes; the most is {MAX_ROW_BYTES}")
    try:
        return PromptRow(row, raw.decode(), None, overrides)
    except UnicodeDecodeError as error:
        return PromptRow(row, error=f"the prompt is not valid UTF-8: byte {raw[error.start]:#04x} at {error.start}")


def token_row(row: int, ids: np.ndarray, overrides: Mapping[str, Any] = NO_OVERRIDES) -> PromptRow:
    """A row from integers; empty ones and those with ids outside int32's positive half become an error row."""
    if not len(ids):
        return PromptRow(row, error="the prompt is empty")
    if 4 * len(ids) > MAX_ROW_BYTES:
        return PromptRow(row, error=f"the row has {4 * len(ids)} bytes; the most is {MAX_ROW_BYTES}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0:
        return PromptRow(row, error=f"token id {low} at position {int(ids.argmin())} is negative")
    if high > schema.MAX_TOKEN_ID:
        return PromptRow(row, error=f"token id {high} at position {int(ids.argmax())} is above {schema.MAX_TOKEN_ID}")
    return PromptRow(row, None, ids.astype(np.int32), overrides)


class PromptsReader(abc.ABC):
    """A set of prompts, whatever its layout: numbered rows, read in blocks with flat memory.

    Readers are opened by `reader.open_prompts`, are used by one thread at a time, and are context managers.
    """

    layout: str
    """Name of the layout, for messages and `inspect`."""
    kind: str
    """"text" or "token_ids"."""
    num_rows: int
    paths: tuple[str, ...]
    """The files, in row order."""
    continuation = ""
    """The meta column whose values rows come with; "" for none."""

    def read_continuations(self, name: str) -> None:
        """From now on rows come with their values of the meta column `name`. Raises DataError where there is no such column."""
        raise DataError(
            f"{self.paths[0]} has no meta column {name!r} of continuations", found=f"layout: {self.layout}",
            fix=f"convert the prompts with --meta-columns {name}",
        )

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[PromptRow]:
        """Yields rows [start, stop) in order, bad ones with their error.

        Raises:
            DataError: the range is not inside the prompts, or the file is damaged beyond single rows.
            ResumableError: the file system failed.
        """
        stop = self._checked(start, stop)
        return self._rows(start, stop)

    def ids(self, start: int = 0, stop: int | None = None) -> Iterator[str | None]:
        """Yields the users' own names of rows [start, stop), None where a row has none. Raises as `rows`."""
        return self._ids(start, self._checked(start, stop))

    def _checked(self, start: int, stop: int | None) -> int:
        stop = self.num_rows if stop is None else stop
        if not 0 <= start <= stop <= self.num_rows:
            raise DataError(f"rows {start} to {stop} of {self.paths[0]}", found=f"rows 0 to {self.num_rows}")
        return stop

    def _ids(self, start: int, stop: int) -> Iterator[str | None]:
        for _ in range(start, stop):
            yield None

    def meta_names(self) -> tuple[str, ...]:
        """Names of the meta columns, as the keys of the input were; none where a layout has none."""
        return ()

    def meta(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Any]:
        """Yields one meta column's values of rows [start, stop); None where a row has none. Raises as `rows`."""
        return self._meta(name, start, self._checked(start, stop))

    def _meta(self, name: str, start: int, stop: int) -> Iterator[Any]:
        for _ in range(start, stop):
            yield None

    @abc.abstractmethod
    def _rows(self, start: int, stop: int) -> Iterator[PromptRow]:
        """Yields rows of a range that is known to be inside."""

    def fingerprint_of(self, num_rows: int) -> str:
        """The fingerprint of the content of the first `num_rows` rows; "" where none is stored."""
        return ""

    def offsets_sample(self, num_rows: int) -> Iterator[np.ndarray]:
        """Blocks of the offsets of the first `num_rows` rows, for the identity; none where a layout has no offsets."""
        yield from ()

    @abc.abstractmethod
    def close(self) -> None:
        """Closes the files. May be called again."""

    def __enter__(self) -> PromptsReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
