"""Converters of text files: JSON Lines, and one prompt a line."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator
from typing import Any

from hpcinfer.data.convert.base import Converter, ConvertOptions, Record, Reject, register
from hpcinfer.data.convert.columns import ColumnMapper, raw_text
from hpcinfer.data.convert.sources import bounded_lines
from hpcinfer.data.prompts import schema
from hpcinfer.errors import ConfigError, DataError


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def refuse_array(source: str, line: bytes) -> None:
    """Raises DataError where the first line of a file begins an array of objects: it is one JSON value, no line of which is a row."""
    if _ARRAY.match(line):
        raise DataError(
            f"{source} is a JSON array, not JSON Lines", found=f"it begins with {raw_text(line[:20])!r}",
            fix=f"write one object a line: jq -c '.[]' {shlex.quote(source)} > NAME.jsonl",
        )


_ARRAY = re.compile(rb"\s*\[\s*(\{|$)")

# json.loads with options would build a new decoder for each line.
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def decode_object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line. Raises DataError."""
    try:
        values = _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"not valid UTF-8: byte {line[error.start]:#04x} at {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"not a JSON object: {schema.shorten(values)}")
    return values


@register
class JsonLines(Converter):
    """One JSON object a line. Empty lines are passed over."""

    name = "jsonl"
    suffixes = (".jsonl", ".ndjson", ".json")

    def __init__(self, options: ConvertOptions) -> None:
        super().__init__(options)
        self._mapper = ColumnMapper(options)

    def records(self, source: str) -> Iterator[Record | Reject]:
        """Yields a Record or a Reject a line."""
        is_first = True
        for number, line in bounded_lines(source, self.options.max_line_bytes):
            if is_first and line and not line.isspace():
                is_first = False
                refuse_array(source, line)
            if line is None:
                yield Reject(number, f"the line is longer than {self.options.max_line_bytes} bytes")
            elif line and not line.isspace():
                raw = raw_text(line)
                try:
                    yield self._mapper.record(number, decode_object(line), raw)
                except (DataError, ConfigError) as error:
                    yield Reject(number, schema.one_line(error), raw)


@register
class PlainText(Converter):
    """One prompt a line, as it stands: a table of one column, named as `prompt_column`. An empty line is no prompt and is rejected,
    so that no line goes unexplained.
    """

    name = "text"
    suffixes = (".txt", ".text")

    def __init__(self, options: ConvertOptions) -> None:
        super().__init__(options)
        self._mapper = ColumnMapper(dataclasses.replace(options, id_column=""))

    def records(self, source: str) -> Iterator[Record | Reject]:
        """Yields a Record or a Reject a line."""
        for number, line in bounded_lines(source, self.options.max_line_bytes):
            if line is None:
                yield Reject(number, f"the line is longer than {self.options.max_line_bytes} bytes")
                continue
            raw = raw_text(line)
            try:
                if not line:
                    raise DataError("the prompt is empty")
                yield self._mapper.record(number, {self.options.prompt_column: line.decode()}, raw)
            except UnicodeDecodeError as error:
                yield Reject(number, f"not valid UTF-8: byte {line[error.start]:#04x} at {error.start}", raw)
            except (DataError, ConfigError) as error:
                yield Reject(number, schema.one_line(error), raw)
