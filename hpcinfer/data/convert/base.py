"""What a converter is: a class that yields records and rejects from one source, and a registry of them."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import gzip
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

from hpcinfer.errors import DataError, UsageError

MAX_LINE_BYTES = 64 << 20
"""Longer lines are rejected unread: no model takes such a prompt, and memory stays flat."""

ALL = "all"
NONE = "none"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ConvertOptions:
    """How a source is read. The command line takes its defaults from here."""

    prompt_column: str = "prompt"
    """Column with the prompt: text, or a list of token ids. Default "prompt"."""
    id_column: str = ""
    """Column with the user's own name of a row. Default "": the column "id" where there is one."""
    sampling_columns: str = ALL
    """Columns that override the sampling of their row: "all" (every column named as a field of SamplingParams), "none",
    or names with commas. Default "all"."""
    meta_columns: str = NONE
    """Other columns to keep under /meta, as JSON: "all", "none", or names with commas. Default "none"."""
    dataset: str = ""
    """For HDF5: where the prompts are. Default "": found by itself."""
    max_line_bytes: int = MAX_LINE_BYTES
    """Longest line in bytes; a longer one is rejected. Default 64 MiB."""


class Record(NamedTuple):
    """One good prompt of a source."""

    number: int
    """Line number from 1, or row number from 0: as the users of the format count."""
    prompt: str | Sequence[int]
    id: str | None = None
    overrides: Mapping[str, Any] | None = None
    meta: Mapping[str, Any] | None = None
    raw: str = ""
    """What the record was made from, for the reject file, should a later step refuse it."""


class Reject(NamedTuple):
    """One piece of a source that is not a prompt."""

    number: int
    reason: str
    raw: str = ""


class Converter(abc.ABC):
    """Reads one source as a stream, in memory that does not grow with it."""

    name: ClassVar[str]
    """As in `--format`."""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """File name endings that choose it; ".gz" after them is understood by `open_source`."""
    unit: ClassVar[str] = "line"
    """What `number` counts."""

    def __init__(self, options: ConvertOptions) -> None:
        self.options = options

    @abc.abstractmethod
    def records(self, source: str) -> Iterator[Record | Reject]:
        """Yields what is in the source, in order. Raises DataError when it cannot be read at all."""


CONVERTERS: dict[str, type[Converter]] = {}


def register(converter: type[Converter]) -> type[Converter]:
    """Class decorator: makes a converter known by its name."""
    CONVERTERS[converter.name] = converter
    return converter


def converter_for(source: str, name: str = "") -> type[Converter]:
    """The converter by name, or by the ending of the source's name; folders are HDF5 shards.

    Raises:
        UsageError: no such format, or the ending says nothing.
    """
    if name:
        if name not in CONVERTERS:
            raise UsageError(f"no format {name!r}", fix=f"use one of {', '.join(CONVERTERS)}")
        return CONVERTERS[name]
    if os.path.isdir(source):
        return CONVERTERS["hdf5"]
    ending = Path(source.lower().removesuffix(".gz")).suffix
    for converter in CONVERTERS.values():
        if ending in converter.suffixes:
            return converter
    known = ", ".join(f"{c.name} ({' '.join(c.suffixes)})" for c in CONVERTERS.values())
    raise UsageError(f"the format of {source} is not plain from its name", fix=f"give --format: {known}")


@contextlib.contextmanager
def open_source(source: str) -> Iterator[BinaryIO]:
    """Opens a file for reading bytes, through gzip when its first bytes say so; closes it at the end.

    Raises:
        DataError: it cannot be opened.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(source, "rb"))
            if file.peek(2)[:2] == b"\x1f\x8b":
                file = stack.enter_context(gzip.GzipFile(fileobj=file))
        except IsADirectoryError as error:
            raise DataError(f"{source} is a folder", fix="name a file in it") from error
        except OSError as error:
            raise DataError(f"cannot read {source}", found=error.strerror or str(error)) from error
        yield file


def bounded_lines(source: str, most: int) -> Iterator[tuple[int, bytes | None]]:
    """Yields (number from 1, line without its end); None for a line longer than `most` bytes, which is skipped unread.

    A file's last line need not end. Line ends are "\\n" or "\\r\\n"; a byte order mark at the start is taken off.

    Raises:
        DataError: the file cannot be opened, or ends or breaks in the middle of its compression.
    """
    number = 0
    with open_source(source) as file:
        try:
            while line := file.readline(most + 2):
                number += 1
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                content = line.removesuffix(b"\n").removesuffix(b"\r")
                if len(content) > most:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(1 << 20)
                    yield number, None
                else:
                    yield number, content
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{source} breaks off after line {number}", found=str(error), fix="get the file again"
            ) from error
