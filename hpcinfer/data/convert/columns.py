"""From a row with named columns to a record: where prompt, id, sampling and meta values are, whatever table they came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hpcinfer.data.chat_template import ChatTemplate
from hpcinfer.data.convert.base import ALL, NONE, ConvertOptions, Record
from hpcinfer.data.convert.prompt_template import PromptTemplate
from hpcinfer.data.prompts import schema
from hpcinfer.errors import DataError, UsageError

DEFAULT_ID_COLUMN = "id"
CHAT_COLUMNS = ("tools", "documents", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
"""Columns of a row that go to its chat template, beside the messages."""
_RAW_CHARACTERS = 1000


def raw_text(line: bytes) -> str:
    """The beginning of a line, for the reject file."""
    return line[:_RAW_CHARACTERS].decode(errors="backslashreplace")


def names_of(setting: str) -> frozenset[str]:
    """A setting of names with commas."""
    return frozenset(name.strip() for name in setting.split(",") if name.strip())


def sampling_names(setting: str) -> frozenset[str]:
    """The sampling columns that a setting stands for. Raises UsageError."""
    fields = schema.SAMPLING_COLUMNS
    if setting in (ALL, NONE):
        return frozenset(fields) if setting == ALL else frozenset()
    names = names_of(setting)
    if unknown := names - fields.keys():
        raise UsageError(f"no sampling column {sorted(unknown)[0]!r}", fix=f"known: {', '.join(fields)}")
    return names


class ColumnMapper:
    """Makes records of rows as `options` say.

    Args:
        options: which column is what.
        all_text: every value is text (CSV): sampling values and chat messages are then read as JSON, and an empty
            text is no value.
    Raises:
        UsageError: the options contradict each other, or name a sampling column that there is not.
        CheckpointError: a chat column is given, and the model folder has no usable chat template.
    """

    def __init__(self, options: ConvertOptions, *, all_text: bool = False) -> None:
        self.options = options
        self._all_text = all_text
        if options.chat_column and (options.prompt_template or options.as_chat):
            raise UsageError(
                "both a chat column and a prompt of text", fix="give --chat-column alone, or --as-chat with --prompt-template or a column"
            )
        if options.system_prompt and not options.as_chat:
            raise UsageError("a system prompt belongs to a chat", fix="give --as-chat with it; chat messages have their own")
        self._template = PromptTemplate(options.prompt_template) if options.prompt_template else None
        self._chat = None
        if options.chat_column or options.as_chat:
            if not options.model:
                raise UsageError("chat messages need the model's chat template", fix="give --model FOLDER")
            self._chat = ChatTemplate(options.model)
        self._sampling = sampling_names(options.sampling_columns)
        self._id_column = options.id_column or DEFAULT_ID_COLUMN
        self._sampling -= self._prompt_columns | {options.id_column}
        self._all_meta = options.meta_columns == ALL
        self._meta = frozenset() if options.meta_columns == NONE else names_of(options.meta_columns)

    @property
    def _prompt_columns(self) -> frozenset[str]:
        if self._template is not None:
            return self._template.columns
        if self.options.chat_column:
            return frozenset((self.options.chat_column, *CHAT_COLUMNS))
        return frozenset((self.options.prompt_column,))

    def columns(self) -> frozenset[str] | None:
        """Names of the columns that may be asked for; None: all."""
        return None if self._all_meta else self._prompt_columns | self._sampling | self._meta | {self._id_column}

    def record(self, number: int, values: Mapping[str, Any], raw: str = "") -> Record:
        """The record of one row. Raises DataError, ConfigError where the row cannot be used."""
        prompt = self._prompt(values)
        given = {name: values[name] for name in self._sampling & values.keys() if self._is_given(values[name])}
        if self._all_text:
            given = {name: _sampling_of_text(name, value) for name, value in given.items()}
        return Record(
            number,
            prompt,
            self._id(values),
            schema.checked_overrides(given) if given else None,
            self._kept(values),
            raw,
            rendered=self._chat is not None,
        )

    def _is_given(self, value: Any) -> bool:
        return value is not None and not (self._all_text and value == "")

    def _prompt(self, values: Mapping[str, Any]) -> str | list[int]:
        if self.options.chat_column:
            return self._rendered(self._value(self.options.chat_column, values), values)
        prompt = self._template.render(values) if self._template is not None else self._value(self.options.prompt_column, values)
        if self.options.as_chat:
            return self._as_chat(prompt)
        if isinstance(prompt, list):
            check_token_ids(prompt)
        elif not isinstance(prompt, str):
            raise DataError(f"the prompt is neither text nor a list of token ids: {schema.shorten(prompt)}")
        return prompt

    def _value(self, name: str, values: Mapping[str, Any]) -> Any:
        value = values.get(name)
        if value is None and name in values:
            raise DataError(f"column {name!r} is null")
        if value is None:
            raise DataError(f"no column {name!r}; the line has {schema.shorten(sorted(values))}")
        return value

    def _as_chat(self, prompt: Any) -> str:
        if not isinstance(prompt, str):
            raise DataError(f"the prompt is no text that could be a chat message: {schema.shorten(prompt)}")
        if not prompt:
            raise DataError("the prompt is empty")
        messages = [{"role": "system", "content": self.options.system_prompt}] if self.options.system_prompt else []
        return self._chat.render([*messages, {"role": "user", "content": prompt}], **self.options.chat_template_args)

    def _rendered(self, messages: Any, values: Mapping[str, Any]) -> str:
        given = {name: values[name] for name in CHAT_COLUMNS if self._is_given(values.get(name))}
        if self._all_text or isinstance(messages, str):
            messages = _decoded(messages, self.options.chat_column)
        for name, value in given.items():
            if isinstance(value, str):
                given[name] = _decoded(value, name)
        more = given.pop("chat_template_kwargs", {})
        if not isinstance(more, dict):
            raise DataError(f"chat_template_kwargs is not an object: {schema.shorten(more)}")
        return self._chat.render(messages, **{**self.options.chat_template_args, **more, **given})

    def _id(self, values: Mapping[str, Any]) -> str | None:
        value = values.get(self._id_column)
        if not self._is_given(value):
            if self.options.id_column:
                there = schema.shorten(sorted(values))
                raise DataError(f"no id column {self.options.id_column!r}; the line has {there}")
            return None
        try:
            return value if isinstance(value, str) else json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"the id cannot be stored: {error}") from error

    def _kept(self, values: Mapping[str, Any]) -> dict[str, Any] | None:
        if self._all_meta:
            used = self._sampling | {self._id_column}
            # What a template is made of is kept: the prompt alone does not say it.
            used |= frozenset() if self._template is not None else self._prompt_columns
            return {name: _null_for_nan(value) for name, value in values.items() if name not in used}
        return {name: _null_for_nan(values[name]) for name in self._meta & values.keys()} if self._meta else None


def _null_for_nan(value: Any) -> Any:
    # Tables have NaN where a number is missing, and JSON has no such number.
    return None if isinstance(value, float) and value != value else value


def _sampling_of_text(name: str, text: str) -> Any:
    """A sampling value from a cell: JSON, or the text where the field may be one and JSON would make something else of it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    column = schema.SAMPLING_COLUMNS[name]
    if column.dtype != "json":
        return value
    # [0-9] and 5 are stop texts and regular expressions as much as JSON.
    return value if isinstance(value, dict if column.items is None else list) else text


def _decoded(text: Any, name: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"column {name!r} is not JSON: {error}") from error


def check_token_ids(ids: list[Any]) -> None:
    """Raises DataError where a list is not one of token ids."""
    for position, value in enumerate(ids):
        # type() and not isinstance: true and false are integers in Python, but no token ids.
        if type(value) is not int or not 0 <= value <= schema.MAX_TOKEN_ID:
            shown = schema.shorten(value)
            raise DataError(f"token id {shown} at position {position} is not from 0 to {schema.MAX_TOKEN_ID}")
