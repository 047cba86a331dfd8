"""Runs a converter: records to a prompts file, rejects to a reject file, counts to whoever asked."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from hpcinfer.data.convert import csv_table, foreign_hdf5, lines, openai, parquet  # noqa: F401 - importing them registers them
from hpcinfer.data.convert.base import Converter, ConvertOptions, Record, Reject, converter_for
from hpcinfer.data.convert.order import ORDERS, Sorter
from hpcinfer.data.convert.sources import unchanged
from hpcinfer.data.convert.tokenised import tokenised
from hpcinfer.data.hdf5 import refuse_to_replace, whole_file
from hpcinfer.data.prompts import schema
from hpcinfer.data.prompts.packed import MAX_ROW_BYTES
from hpcinfer.data.prompts.prompts_writer import PromptsWriter
from hpcinfer.data.prompts.rejects import reject_path
from hpcinfer.data.tokenize import Tokenizer
from hpcinfer.errors import DataError, RowError, UsageError
from hpcinfer.units import counted

_ROWS_A_REPORT = 10_000


@dataclasses.dataclass(slots=True)
class ConvertSummary:
    """What came of a conversion."""

    destination: str
    kind: str = ""
    """"text" or "token_ids"."""
    num_rows: int = 0
    num_rejected: int = 0
    reject_file: str = ""
    """Path of the reject file; empty when nothing was rejected."""
    first_rejects: list[str] = dataclasses.field(default_factory=list)
    """The first few, as "file:line: reason"."""


@dataclasses.dataclass(slots=True)
class _Progress:
    summary: ConvertSummary
    report: Callable[[ConvertSummary], None] | None
    seen: int = 0

    def step(self) -> None:
        self.seen += 1
        if self.report is not None and self.seen % _ROWS_A_REPORT == 0:
            self.report(self.summary)


def convert(
    sources: Sequence[str | os.PathLike],
    destination: str | os.PathLike,
    *,
    format: str = "",
    options: ConvertOptions | None = None,
    sort: str = "",
    max_rejected: Callable[[int], int] | None = None,
    overwrite: bool = False,
    show_rejects: int = 5,
    on_reject: Callable[[str], None] | None = None,
    on_progress: Callable[[ConvertSummary], None] | None = None,
) -> ConvertSummary:
    """Converts sources, in order, into one prompts file, in flat memory. Bad lines go to DESTINATION.rejected.jsonl.

    Args:
        sources: files; a glob pattern that names no file stands for its matches in order of names.
        format: name of a converter; by default chosen from each file's name.
        sort: "prefix" or "length" puts the rows in that order (data/convert/order.py); by default that of the sources.
        max_rejected: of so many lines, how many may be rejected; more is an error. By default any number.
        overwrite: replace an existing destination.
        show_rejects: how many rejects are handed to `on_reject` and kept in the summary.
        on_reject: called with "file:line: reason".
        on_progress: called now and then with the counts so far.
    Raises:
        DataError: a source cannot be read, no line is good, too many are bad, the destination exists or cannot be
            written. The destination then does not appear; the reject file does. Where they are there from before they stay what
            they were, and the rejects are in DESTINATION.failed.rejected.jsonl.
        UsageError: the format is not known, or options contradict each other.
        CheckpointError: the model folder lacks what the options need of it.
    """
    options = options or ConvertOptions()
    destination = os.fspath(destination)
    if destination == "-":
        raise UsageError("HDF5 cannot be written to a stream", fix="give a file as DEST.h5; ./- is one of that name")
    files = _expand(sources)
    if os.path.isdir(destination):
        raise DataError(f"{destination} is a folder", fix="name the file to write")
    if os.path.exists(destination) and not overwrite:
        raise DataError(f"{destination} exists", fix="give another name, or --overwrite")
    refuse_to_replace(destination, files)
    for rejects in (destination, _failed(destination)):
        refuse_to_replace(reject_path(rejects), [file for file in files if not os.path.isdir(file)])
    if sort and sort not in ORDERS:
        raise UsageError(f"no order {sort!r}", fix=f"sort by one of {', '.join(ORDERS)}")
    # Every source is looked at before a byte is written. Files of one format share a converter, which knows all their ids.
    kinds = [converter_for(file, format) for file in files]
    converters = {kind: kind(options) for kind in kinds}
    opened = [(file, converters[kind]) for file, kind in zip(files, kinds, strict=True)]
    tokenizer = Tokenizer(options.model) if options.model else None
    summary = ConvertSummary(destination)
    rejects = _RejectFile(destination, summary, show_rejects, on_reject)
    with rejects, contextlib.ExitStack() as stack:
        output = _Output(destination, summary, rejects, opened, stack)
        sorter = stack.enter_context(Sorter(sort, os.path.dirname(destination) or ".")) if sort else None
        progress = _Progress(summary, on_progress)
        for index, (file, converter) in enumerate(opened):
            with unchanged(file):
                items = converter.records(file)
                for item in tokenised(items, tokenizer) if tokenizer is not None else items:
                    progress.step()
                    if isinstance(item, Reject):
                        rejects.add(file, converter, item)
                    elif sorter is None:
                        output.append(index, item)
                    else:
                        output.sort(sorter, index, item)
        if sorter is not None:
            for index, item in sorter.items():
                output.append(index, item)
        _check_counts(summary, max_rejected)
        output.finish()
    return summary


def _failed(destination: str) -> str:
    """What a destination would be called that an earlier one is in the place of: its reject file is named after it."""
    return f"{destination}.failed"


class _Output:
    """The prompts file, created with its first record; what it cannot hold goes to the rejects."""

    def __init__(
        self,
        destination: str,
        summary: ConvertSummary,
        rejects: _RejectFile,
        opened: Sequence[tuple[str, Converter]],
        stack: contextlib.ExitStack,
    ) -> None:
        self._destination = destination
        self._summary = summary
        self._rejects = rejects
        self._opened = opened
        self._stack = stack
        self._writer: PromptsWriter | None = None

    def _refused(self, source: int, record: Record) -> bool:
        """Whether a record is not of this file's kind, which the first one decides; it is then rejected."""
        if not len(record.prompt):
            self._reject(source, record, "the prompt is empty")
            return True
        # A bound on characters and not on bytes, which would have to be counted; the writer bounds these.
        if len(record.prompt) * (1 if isinstance(record.prompt, str) else 4) > MAX_ROW_BYTES:
            self._reject(source, record, f"the prompt is longer than {MAX_ROW_BYTES} bytes")
            return True
        kind = schema.TEXT if isinstance(record.prompt, str) else schema.TOKEN_IDS
        self._summary.kind = self._summary.kind or kind
        if kind != self._summary.kind:
            names = ("text", "token ids") if kind == schema.TEXT else ("token ids", "text")
            self._reject(source, record, f"the prompt is {names[0]} in a file of {names[1]}; a file holds one kind")
            return True
        return False

    def sort(self, sorter: Sorter, source: int, record: Record) -> None:
        """Hands a record to the sorter."""
        if not self._refused(source, record):
            try:
                sorter.add(source, record)
            except RowError as error:
                self._reject(source, record, schema.one_line(error))

    def append(self, source: int, record: Record) -> None:
        """Writes a record. Raises DataError when the destination cannot be written."""
        if self._refused(source, record):
            return
        if self._writer is None:
            self._writer = self._stack.enter_context(PromptsWriter(self._destination, kind=self._summary.kind))
        try:
            self._writer.append(record.prompt, id=record.id, overrides=record.overrides, meta=record.meta)
        except DataError as error:
            if self._writer.is_broken:
                raise
            # The writer speaks of rows of the prompts file, which nobody will find there.
            self._reject(source, record, f"the row cannot be stored: {error.found}" if error.found else schema.one_line(error))
        else:
            self._summary.num_rows += 1

    def _reject(self, source: int, record: Record, reason: str) -> None:
        file, converter = self._opened[source]
        self._rejects.add(file, converter, Reject(record.number, reason, record.raw, record.id))

    def finish(self) -> None:
        """Says in the file how many rows were rejected, so that nobody takes it for the whole."""
        if self._writer is not None:
            self._writer.num_rejected = self._summary.num_rejected


def _expand(sources: Sequence[str | os.PathLike]) -> list[str]:
    files: list[str] = []
    for source in map(os.fspath, sources):
        if os.path.exists(source):
            files.append(source)
        else:
            matches = sorted(glob.glob(source, recursive=True))
            if not matches:
                fix = "name /dev/stdin, and give --format" if source == "-" else "give the path of a file, or a glob that has matches"
                raise DataError(f"no such file: {source}", fix=fix)
            files += matches
    return files


def _check_counts(summary: ConvertSummary, max_rejected: Callable[[int], int] | None) -> None:
    if not summary.num_rows:
        if not summary.num_rejected:
            raise DataError("there is no good prompt in the source", found="it is empty", fix="give a file that has rows")
        found = f"{summary.num_rejected} rejected"
        if summary.first_rejects:
            found += f"; the first: {summary.first_rejects[0]}"
        raise DataError(
            "there is no good prompt in the source", found=found, fix="check --format and --prompt-column"
        )
    allowed = None if max_rejected is None else max_rejected(summary.num_rows + summary.num_rejected)
    if allowed is not None and summary.num_rejected > allowed:
        raise DataError(
            f"{counted(summary.num_rejected, 'line')} rejected, {allowed} allowed", fix=f"see {summary.reject_file}"
        )


class _RejectFile:
    """JSON Lines {source, line or row, reason, raw}, with id and code where there are any.

    There when a conversion with rejects ends, well or not; under another name where an earlier destination stays.
    """

    def __init__(
        self, destination: str, summary: ConvertSummary, show: int, on_reject: Callable[[str], None] | None
    ) -> None:
        self._path = reject_path(destination)
        self._failed_path = reject_path(_failed(destination)) if os.path.exists(destination) else self._path
        self._summary = summary
        self._show = show
        self._on_reject = on_reject
        self._stack = contextlib.ExitStack()
        self._file: TextIO | None = None

    def add(self, source: str, converter: Converter, reject: Reject) -> None:
        """Writes one reject."""
        self._summary.num_rejected += 1
        if self._summary.num_rejected <= self._show:
            between = ":" if converter.unit == "line" else f" {converter.unit} "
            text = f"{source}{between}{reject.number}: {reject.reason}"
            self._summary.first_rejects.append(text)
            if self._on_reject is not None:
                self._on_reject(text)
        entry: dict[str, Any] = {
            "source": source, converter.unit: reject.number, "reason": reject.reason, "raw": reject.raw
        }  # fmt: skip
        entry |= {"id": reject.id} if reject.id is not None else {}
        entry |= {"code": reject.code} if reject.code else {}
        # ASCII escapes: file names and raw text may hold what UTF-8 cannot.
        self._open().write(json.dumps(entry) + "\n")

    def _open(self) -> TextIO:
        if self._file is None:
            temporary = self._stack.enter_context(whole_file(self._failed_path))
            self._file = self._stack.enter_context(open(temporary, "w", encoding="ascii"))
            self._summary.reject_file = self._failed_path
        return self._file

    def __enter__(self) -> _RejectFile:
        if os.path.isdir(self._path):
            raise DataError(f"cannot write {self._path}", found="it is a folder", fix="give another DEST")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stack.close()
        if kind is not None and self._failed_path != self._path:
            return
        try:
            if self._file is not None:
                os.replace(self._failed_path, self._path)
                self._summary.reject_file = self._path
            else:  # one from an earlier conversion would be taken for this one's
                Path(self._path).unlink(missing_ok=True)
        except OSError as error:
            fix = "give a DEST in a folder that you can write to"
            raise DataError(f"cannot write {self._path}", found=error.strerror or str(error), fix=fix) from error
