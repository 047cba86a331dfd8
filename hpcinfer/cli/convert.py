"""Prompts from JSON Lines, CSV, Parquet, OpenAI batch files, plain text or foreign HDF5 to a prompts file.

Streams, whatever the size. Bad lines are reported with their number, written to DEST.rejected.jsonl, and left out; the
good ones are kept. Sources may be compressed (gzip, bzip2, xz, zstd). A prompt is a column, a template of columns
(--prompt-template), or chat messages in the model's chat template (--chat-column, --model).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable
from typing import Any

from hpcinfer.errors import ExitCode, UsageError
from hpcinfer.units import counted, format_count


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `hpcinfer convert`."""
    from hpcinfer.data.convert.base import ConvertOptions

    defaults = ConvertOptions()
    parser.add_argument("sources", nargs="+", metavar="SRC", help="source files, globs, or a folder of HDF5 shards")
    parser.add_argument("destination", metavar="DEST.h5", help="the prompts file to write")
    parser.add_argument(
        "--format", default="", metavar="NAME",
        help="jsonl, csv, parquet, text, hdf5 (default: by SRC's name), or openai: a file of the OpenAI batch API",
    )  # fmt: skip
    parser.add_argument(
        "--prompt-column", default=defaults.prompt_column, metavar="NAME",
        help="column with the prompt: text or a list of token ids (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--prompt-template", default=defaults.prompt_template, metavar="TEXT",
        help='the prompt, with columns in braces: "Translate into {language}: {text}"; {{ and }} are braces',
    )  # fmt: skip
    parser.add_argument(
        "--chat-column", default=defaults.chat_column, metavar="NAME",
        help="column with chat messages, a list of {role, content}; columns tools, documents, chat_template_kwargs are used too",
    )  # fmt: skip
    parser.add_argument(
        "--as-chat", action="store_true", help="the prompt is what a user says: render it by the chat template of --model"
    )
    parser.add_argument(
        "--system-prompt", default=defaults.system_prompt, metavar="TEXT", help="with --as-chat: what the system says before"
    )
    parser.add_argument(
        "--chat-template-args", default="{}", metavar="JSON", help="more variables for the chat template, as a JSON object"
    )
    parser.add_argument(
        "--model", default=defaults.model, metavar="FOLDER",
        help="Hugging Face folder: its chat template renders chats, and all prompts are stored as its token ids",
    )  # fmt: skip
    parser.add_argument(
        "--served-model-name", action="append", default=[], metavar="NAME",
        help='openai: what body.model may be, may be repeated; "*": anything (default: FOLDER or its last part)',
    )  # fmt: skip
    parser.add_argument(
        "--samples", type=int, default=defaults.num_samples, metavar="N",
        help="openai: sampling.n of the job; lines that ask for another n are rejected (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--delimiter", default=defaults.delimiter, metavar="C", help="csv: default a comma; a tab in .tsv")
    parser.add_argument(
        "--sort", default="", choices=["prefix", "length"],
        help="order of the rows: those that begin alike together, or the longest first (default: as in the sources)",
    )  # fmt: skip
    parser.add_argument(
        "--id-column", default=defaults.id_column, metavar="NAME",
        help="column with the row's own name, required in every line (default: id, where there is one)",
    )  # fmt: skip
    parser.add_argument(
        "--sampling-columns", default=defaults.sampling_columns, metavar="NAMES",
        help="columns that override the job's sampling for their row: all, none, or names with commas; "
        "names are those of the job's [sampling] section (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--meta-columns", default=defaults.meta_columns, metavar="NAMES",
        help="other columns to keep under /meta: all, none, or names with commas (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--dataset", default=defaults.dataset, metavar="NAME", help="for HDF5: where the prompts are")
    parser.add_argument(
        "--max-rejected", default="100%", metavar="N|P%",
        help="more rejected lines than this count or share are a failure (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace DEST.h5 if it exists")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")


def execute(args: argparse.Namespace) -> int:
    """Converts, and prints what came of it. Returns 0."""
    from hpcinfer.data.convert.base import ConvertOptions
    from hpcinfer.data.convert.driver import ConvertSummary, convert

    counter = _Counter()

    def progress(summary: ConvertSummary) -> None:
        counter.show(f"{counted(summary.num_rows, 'row')}, {format_count(summary.num_rejected)} rejected")

    def rejected(text: str) -> None:
        counter.clear()
        print(f"rejected {text}", file=sys.stderr)

    options = ConvertOptions(
        prompt_column=args.prompt_column,
        prompt_template=args.prompt_template,
        chat_column=args.chat_column,
        as_chat=args.as_chat,
        system_prompt=args.system_prompt,
        chat_template_args=_json_object(args.chat_template_args, "--chat-template-args"),
        model=args.model,
        served_model_names=tuple(args.served_model_name),
        num_samples=args.samples,
        delimiter=args.delimiter,
        id_column=args.id_column,
        sampling_columns=args.sampling_columns,
        meta_columns=args.meta_columns,
        dataset=args.dataset,
    )
    try:
        summary = convert(
            args.sources,
            args.destination,
            format=args.format,
            options=options,
            sort=args.sort,
            max_rejected=parse_share(args.max_rejected, "--max-rejected"),
            overwrite=args.overwrite,
            on_reject=rejected,
            on_progress=progress,
        )
    finally:
        counter.clear()
    if args.json:
        print(json.dumps(dataclasses.asdict(summary)))
        return ExitCode.DONE
    kind = summary.kind.replace("_", " ")
    print(f"{summary.destination}: {counted(summary.num_rows, 'row')} of {kind}")
    if summary.num_rejected:
        print(f"{format_count(summary.num_rejected)} rejected, all of them in {summary.reject_file}")
    return ExitCode.DONE


def _json_object(text: str, flag: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{flag} {text!r} is not JSON", found=str(error), fix='give one such as {"enable_thinking": false}') from error
    if not isinstance(value, dict):
        raise UsageError(f"{flag} {text!r} is not a JSON object", fix='give one such as {"enable_thinking": false}')
    return value


def parse_share(text: str, flag: str) -> Callable[[int], int]:
    """"20" or "1%" as a function from the number of all to the number allowed. Raises UsageError."""
    if not re.fullmatch(r"\d+|\d+(\.\d+)?%", text, re.ASCII):
        raise UsageError(f"{flag} {text!r}", fix='give a count such as "20" or a share such as "1%"')
    if text.endswith("%"):
        return lambda total: int(float(text[:-1]) / 100 * total)
    return lambda total: int(text)


class _Counter:
    """A line on the terminal that is written over; nothing where stderr is no terminal."""

    def __init__(self) -> None:
        self._shows = sys.stderr.isatty()
        self._width = 0

    def show(self, text: str) -> None:
        if self._shows:
            sys.stderr.write(f"\r{text:<{self._width}}")
            sys.stderr.flush()
            self._width = len(text)

    def clear(self) -> None:
        if self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            self._width = 0
