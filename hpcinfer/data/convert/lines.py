"""Converters of text files: JSON Lines, and one prompt a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from hpcinfer.data.prompts import schema
from hpcinfer.data.convert.base import ALL, NONE, Converter, ConvertOptions, Record, Reject, bounded_lines, register
from hpcinfer.errors import ConfigError, DataError, UsageError

_RAW_CHARACTERS = 1000
_DEFAULT_ID_COLUMN = "id"


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


# json.loads with options would build a new decoder for each line.
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _raw(line: bytes) -> str:
    return line[:_RAW_CHARACTERS].decode(errors="backslashreplace")


def _names(setting: str) -> frozenset[str]:
    return frozenset(name.strip() for name in setting.split(",") if name.strip())


@register
class JsonLines(Converter):
    """One JSON object a line. Empty lines are passed over."""

    name = "jsonl"
    suffixes = (".jsonl", ".ndjson", ".json")

    def __init__(self, options: ConvertOptions) -> None:
        super().__init__(options)
        fields = schema.SAMPLING_COLUMNS
        self._sampling = _names(options.sampling_columns)
        if options.sampling_columns == ALL:
            self._sampling = frozenset(fields)
        elif options.sampling_columns == NONE:
            self._sampling = frozenset()
        elif unknown := self._sampling - fields.keys():
            raise UsageError(f"no sampling column {sorted(unknown)[0]!r}", fix=f"known: {', '.join(fields)}")
        self._sampling -= {options.prompt_column, options.id_column}
        self._all_meta = options.meta_columns == ALL
        self._meta = frozenset() if options.meta_columns == NONE else _names(options.meta_columns)

    def records(self, source: str) -> Iterator[Record | Reject]:
        """Yields a Record or a Reject a line."""
        for number, line in bounded_lines(source, self.options.max_line_bytes):
            if line is None:
                yield Reject(number, f"the line is longer than {self.options.max_line_bytes} bytes")
            elif line and not line.isspace():
                try:
                    yield self._record(number, line)
                except (DataError, ConfigError) as error:
                    yield Reject(number, schema.one_line(error), _raw(line))

    def _record(self, number: int, line: bytes) -> Record:
        try:
            values = _DECODER.decode(line.decode())
        except UnicodeDecodeError as error:
            raise DataError(f"not valid UTF-8: byte {line[error.start]:#04x} at {error.start}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise DataError(f"not a JSON object: {schema.shorten(values)}")
        prompt = values.get(self.options.prompt_column)
        if prompt is None:
            raise DataError(f"no column {self.options.prompt_column!r}; the line has {schema.shorten(sorted(values))}")
        if isinstance(prompt, list):
            _check_token_ids(prompt)
        elif not isinstance(prompt, str):
            raise DataError(f"the prompt is neither text nor a list of token ids: {schema.shorten(prompt)}")
        given = {name: values[name] for name in self._sampling & values.keys() if values[name] is not None}
        return Record(
            number,
            prompt,
            self._id(values),
            schema.checked_overrides(given) if given else None,
            self._kept(values),
            _raw(line),
        )

    def _id(self, values: dict[str, Any]) -> str | None:
        value = values.get(self.options.id_column or _DEFAULT_ID_COLUMN)
        if value is None:
            if self.options.id_column:
                there = schema.shorten(sorted(values))
                raise DataError(f"no id column {self.options.id_column!r}; the line has {there}")
            return None
        return value if isinstance(value, str) else json.dumps(value)

    def _kept(self, values: dict[str, Any]) -> dict[str, Any] | None:
        if self._all_meta:
            used = self._sampling | {self.options.prompt_column, self.options.id_column or _DEFAULT_ID_COLUMN}
            return {name: value for name, value in values.items() if name not in used}
        return {name: values[name] for name in self._meta & values.keys()} if self._meta else None


def _check_token_ids(ids: list[Any]) -> None:
    for position, value in enumerate(ids):
        # type() and not isinstance: true and false are integers in Python, but no token ids.
        if type(value) is not int or not 0 <= value <= schema.MAX_TOKEN_ID:
            shown = schema.shorten(value)
            raise DataError(f"token id {shown} at position {position} is not from 0 to {schema.MAX_TOKEN_ID}")


@register
class PlainText(Converter):
    """One prompt a line, as it stands; an empty line is no prompt and is rejected, so that no line goes unexplained."""

    name = "text"
    suffixes = (".txt", ".text")

    def records(self, source: str) -> Iterator[Record | Reject]:
        """Yields a Record or a Reject a line."""
        for number, line in bounded_lines(source, self.options.max_line_bytes):
            if line is None:
                yield Reject(number, f"the line is longer than {self.options.max_line_bytes} bytes")
                continue
            try:
                yield Record(number, line.decode(), raw=_raw(line))
            except UnicodeDecodeError as error:
                yield Reject(number, f"not valid UTF-8: byte {line[error.start]:#04x} at {error.start}", _raw(line))
