"""Converter of CSV with a header. Python's own parser and not pyarrow's, which gives a whole file up for one bad row."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator

from hpcinfer.data.convert.base import Converter, ConvertOptions, Record, Reject, register
from hpcinfer.data.convert.columns import ColumnMapper, raw_text
from hpcinfer.data.convert.sources import bounded_lines
from hpcinfer.data.prompts import schema
from hpcinfer.errors import ConfigError, DataError, UsageError
from hpcinfer.units import counted

_FIELD_LIMIT = 2**31 - 1
_Line = tuple[int, bytes | None]


@register
class Csv(Converter):
    """A header, then a row a record (RFC 4180). `number` is the line that a record begins in.

    A quote that nothing closes costs the line it stands in: reading begins again with the next one.
    """

    name = "csv"
    suffixes = (".csv", ".tsv")

    def __init__(self, options: ConvertOptions) -> None:
        super().__init__(options)
        self._mapper = ColumnMapper(options, all_text=True)
        if options.delimiter and (len(options.delimiter) != 1 or options.delimiter in '"\r\n'):
            raise UsageError(f"--delimiter {options.delimiter!r}", fix="give one character")

    def records(self, source: str) -> Iterator[Record | Reject]:
        """Yields a Record or a Reject a record."""
        delimiter = self.options.delimiter or ("\t" if ".tsv" in source.lower()[-8:] else ",")
        # The default of 128 KiB would refuse long prompts; lines are bounded already.
        csv.field_size_limit(_FIELD_LIMIT)
        header: list[str] | None = None
        for number, raw, fields, reason in _records(source, delimiter, self.options.max_line_bytes):
            if header is None:
                header = self._header(source, fields, reason)
                continue
            if not reason and len(fields) != len(header):
                reason = f"{counted(len(fields), 'field')} where the header has {len(header)}"
            if reason:
                yield Reject(number, reason, raw)
                continue
            try:
                yield self._mapper.record(number, dict(zip(header, fields, strict=True)), raw)
            except (DataError, ConfigError) as error:
                yield Reject(number, schema.one_line(error), raw)

    def _header(self, source: str, fields: list[str], reason: str) -> list[str]:
        if reason:
            raise DataError(f"the header of {source} cannot be read", found=reason)
        doubled = sorted({name for name in fields if fields.count(name) > 1})
        if doubled:
            raise DataError(f"the header of {source} names {doubled[0]!r} twice", fix="give each column a name of its own")
        wanted = self._mapper.columns()
        if wanted is not None and not wanted & set(fields):
            raise DataError(
                f"{source} has none of the columns asked for", found=schema.shorten(fields), fix="check --prompt-column and --delimiter"
            )
        return fields


def _records(source: str, delimiter: str, most: int) -> Iterator[tuple[int, str, list[str], str]]:
    """Yields (first line, its beginning, fields, "") or (line, its beginning, [], why it is no record). Empty lines pass."""
    lines = bounded_lines(source, most)
    ahead: deque[_Line] = deque()
    while True:
        first = ahead.popleft() if ahead else next(lines, None)
        if first is None:
            return
        number, line = first
        if line == b"":
            continue
        taken: list[_Line] = [first]
        try:
            fields = _fields(taken, ahead, lines, delimiter, most)
        except DataError as error:
            # The record's further lines may be good rows: a stray quote took them in.
            ahead.extendleft(reversed(taken[1:]))
            yield number, raw_text(line or b""), [], schema.one_line(error)
        else:
            yield number, raw_text(line), fields, ""


def _fields(taken: list[_Line], ahead: deque[_Line], lines: Iterator[_Line], delimiter: str, most: int) -> list[str]:
    """The fields of the record that begins with taken[0]; its further lines are added to `taken`. Raises DataError."""

    def texts() -> Iterator[str]:
        num_bytes = 0
        while True:
            line = taken[-1][1]
            if line is None:
                raise DataError(f"the line is longer than {most} bytes")
            num_bytes += len(line) + 1
            if num_bytes > most + 1:
                raise DataError(f"the record is longer than {most} bytes")
            try:
                yield line.decode() + "\n"
            except UnicodeDecodeError as error:
                raise DataError(f"not valid UTF-8: byte {line[error.start]:#04x} at {error.start}") from error
            following = ahead.popleft() if ahead else next(lines, None)
            if following is None:
                return
            taken.append(following)

    try:
        return next(csv.reader(texts(), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise DataError(f"not valid CSV: {error}") from error
