"""What a converter is: a class that yields records and rejects from one source, and a registry of them."""

from __future__ import annotations

import abc
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from hpcinfer.data.convert.sources import COMPRESSED_SUFFIXES
from hpcinfer.errors import UsageError

MAX_LINE_BYTES = 64 << 20
"""Longer lines are rejected unread: no model takes such a prompt, and memory stays flat."""

ALL = "all"
NONE = "none"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ConvertOptions:
    """How a source is read. The command line takes its defaults from here."""

    prompt_column: str = "prompt"
    """Column with the prompt: text, or a list of token ids. Default "prompt"."""
    prompt_template: str = ""
    """Text with columns in braces, such as "Translate {text}:", that makes the prompt; "{{" is a brace. Default "": no template."""
    chat_column: str = ""
    """Column with chat messages, [{"role": ..., "content": ...}, ...]: the prompt is what the chat template of `model` makes of
    them. Default "": none."""
    as_chat: bool = False
    """The prompt, a column's or a template's, is what a user says: it is rendered by the chat template of `model`. Default false."""
    system_prompt: str = ""
    """With `as_chat`: what the system says before. Default "": nothing."""
    chat_template_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """More variables for the chat template, such as {"enable_thinking": false}. Default none."""
    model: str = ""
    """A Hugging Face folder. With it prompts are stored as token ids of its tokenizer. Default "": stored as they are."""
    served_model_names: tuple[str, ...] = ()
    """For OpenAI batches: what `body.model` may be; "*" allows any. Default (): `model` and its last part, any without `model`."""
    num_samples: int = 1
    """For OpenAI batches: `sampling.n` of the job; a line that asks for another `n` is rejected. Default 1."""
    delimiter: str = ""
    """For CSV: one character. Default "": a tab in files named .tsv, else a comma."""
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
    rendered: bool = False
    """The prompt came out of a chat template: its special tokens are in it, the tokenizer must add none."""


class Reject(NamedTuple):
    """One piece of a source that is not a prompt."""

    number: int
    reason: str
    raw: str = ""
    id: str | None = None
    """The row's own name, where it could be read and no other row has it."""
    code: str = ""
    """For OpenAI batches: what kind of error it is, in one word."""


class Converter(abc.ABC):
    """Reads one source as a stream, in memory that does not grow with it."""

    name: ClassVar[str]
    """As in `--format`."""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """File name endings that choose it; those of compressed files may follow."""
    unit: ClassVar[str] = "line"
    """What `number` counts."""

    def __init__(self, options: ConvertOptions) -> None:
        self.options = options

    @abc.abstractmethod
    def records(self, source: str) -> Iterator[Record | Reject]:
        """Yields what is in the source, in order. Raises DataError when it cannot be read at all."""


def refuse_prompt_options(options: ConvertOptions, format: str) -> None:
    """For formats whose rows are prompts already. Raises UsageError where options say how to make some."""
    for name in ("prompt_template", "chat_column", "as_chat"):
        if getattr(options, name):
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} has no meaning for the format {format}", fix="its rows are prompts; leave it out")


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
    path = Path(source.lower())
    ending = path.with_suffix("").suffix if path.suffix in COMPRESSED_SUFFIXES else path.suffix
    for converter in CONVERTERS.values():
        if ending in converter.suffixes:
            return converter
    known = ", ".join(f"{c.name} ({' '.join(c.suffixes)})" for c in CONVERTERS.values())
    raise UsageError(f"the format of {source} is not plain from its name", fix=f"give --format: {known}")
