"""Generations to files that other programs read: JSON Lines, CSV, Parquet, OpenAI's batch output. Streaming."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from hpcinfer.data.convert.sources import COMPRESSED_SUFFIXES
from hpcinfer.data.export_inputs import NONE, InputColumns, meta_names
from hpcinfer.data.export_tables import write_csv, write_json_lines, write_parquet
from hpcinfer.data.generations import GenerationFile
from hpcinfer.data.hdf5 import refuse_to_replace, whole_file
from hpcinfer.data.ledger.coverage import BadSegments
from hpcinfer.data.ledger.merge import merge_run
from hpcinfer.data.ledger.run_directory import RunDirectory, open_existing
from hpcinfer.data.ledger.status import read_status
from hpcinfer.data.optional_columns import json_values
from hpcinfer.data.prompts.identity import prefix_fingerprint
from hpcinfer.data.prompts.reader import PromptsReader, open_prompts
from hpcinfer.errors import DataError, RunDirectoryError, UsageError
from hpcinfer.request import Generation, Status

RUN_FILE = "run.json"
GENERATIONS_FILE = "generations.h5"

JSONL = "jsonl"
CSV = "csv"
PARQUET = "parquet"
OPENAI = "openai"
FORMATS = (JSONL, CSV, PARQUET, OPENAI)
_SUFFIXES = {".csv": CSV, ".parquet": PARQUET, ".pq": PARQUET}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """What an exported row holds beside row, sample, text, finish_reason, status, token counts and error, and how it is written."""

    format: str = ""
    """jsonl, csv, parquet or openai. Default "": by the destination's name, else jsonl."""
    token_ids: bool = False
    """The generated token ids, as a list. Default false."""
    ids: bool = False
    """Each row's id in the prompts. Default false; true where `prompts` is given."""
    prompts: str = ""
    """The prompts that were run (a file, a folder or a glob). Default "": where a column of them is asked for, those that the run
    directory names."""
    dataset: str = ""
    """As in the job: where the prompts are in a foreign layout."""
    prompt_text: bool = False
    """The prompt itself. Default false."""
    meta_columns: str = NONE
    """Meta columns of the prompts: "all", "none", or names with commas. Default "none"."""
    partial: bool = False
    """Export what is there of a run that is not complete, also while it goes on. Default false: that is an error."""
    errors: str = ""
    """For openai: the error file. Default "": DEST with ".errors" before its ending."""
    model: str = ""
    """For openai with log-probabilities: a folder with the tokenizer. Default "": the run's model."""

    @property
    def needs_prompts(self) -> bool:
        """Whether something of the input is asked for."""
        return bool(self.prompts or self.ids or self.prompt_text or self.meta_columns != NONE or self.format == OPENAI)


@dataclasses.dataclass(frozen=True, slots=True)
class ExportSummary:
    """What was exported."""

    source: str
    destination: str
    num_rows: int
    complete: bool
    """Whether the source says that it holds every row of its run."""
    errors: str = ""
    """For openai: the error file ..."""
    num_errors: int = 0
    """... and how many lines it has."""


def export(
    source: str | os.PathLike,
    destination: str | os.PathLike | BinaryIO,
    options: ExportOptions | None = None,
    *,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> ExportSummary:
    """Writes a row a generation, in the order of the file (openai: a line a row of the prompts).

    Args:
        source: a generations file, a segment, or a run directory (its generations.h5; with `partial` what it has).
        destination: the file to appear, whole or not at all; or an open binary stream.
        options: what each row holds, and the format.
        overwrite: replace an existing destination.
        say: told what is waited for, in words.
    Raises:
        DataError: the source is not there or damaged, the prompts are not those it came from, the destination exists.
        UsageError: the options do not go together.
    """
    options = options or ExportOptions()
    name = "" if not isinstance(destination, str | os.PathLike) else os.fspath(destination)
    options = dataclasses.replace(options, format=options.format or _SUFFIXES.get(Path(name).suffix.lower(), JSONL))
    if options.format not in FORMATS:
        raise UsageError(f"no format {options.format!r}", fix=f"use one of {', '.join(FORMATS)}")
    if Path(name).suffix.lower() in COMPRESSED_SUFFIXES:
        raise UsageError(f"{name} would not be compressed", fix="give DEST -, and pipe the output into gzip or zstd")
    if not name and options.format == PARQUET:
        raise UsageError("Parquet cannot be written to a stream", fix="give a file as DEST")
    with contextlib.ExitStack() as stack:
        run, path = _find(source)
        temporary_folder = os.path.dirname(name) or "." if name else None
        if options.partial and run is not None:
            path = stack.enter_context(_merged(run, temporary_folder, say)) or path
        elif not path.is_file():
            path = generations_path(source)
        file = stack.enter_context(_open_generations(path))
        if run is not None and file.run_uuid != run.uuid:
            run = None  # a file that merely lies in a run directory
        reader = None
        if options.needs_prompts:
            reader = stack.enter_context(_prompts(run, options))
        kept = [path, *(reader.paths if reader is not None else ()), *_files_of(run)]
        if name:
            refuse_to_replace(name, kept)
        out = stack.enter_context(_whole(name, overwrite)) if name else destination
        shown = (str(source if options.partial else path), name or "-")
        if options.format == OPENAI:
            return _export_openai(file, reader, run, out, shown, options, overwrite, kept)
        num_rows = _write(file, reader, out, options)
    return ExportSummary(*shown, num_rows, file.complete)


def export_jsonl(
    source: str | os.PathLike,
    destination: str | os.PathLike | BinaryIO,
    options: ExportOptions | None = None,
    *,
    overwrite: bool = False,
) -> ExportSummary:
    """`export` as JSON Lines, whatever the destination's name."""
    return export(source, destination, dataclasses.replace(options or ExportOptions(), format=JSONL), overwrite=overwrite)


def _find(source: str | os.PathLike) -> tuple[RunDirectory | None, Path]:
    """The run that `source` is, or lies in, and where its generations are or will be."""
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    with contextlib.suppress(RunDirectoryError):
        return open_existing(folder, sleep=lambda seconds: None), path / GENERATIONS_FILE if path.is_dir() else path
    return None, path / GENERATIONS_FILE if path.is_dir() else path


def _files_of(run: RunDirectory | None) -> list[Path]:
    """What an export must not replace beside its source: the run, complete or not, needs them."""
    return [] if run is None else [run.generations, run.path / RUN_FILE, run.done, run.segments]


def generations_path(source: str | os.PathLike) -> Path:
    """The generations file that `source` stands for. Raises DataError when there is none (yet)."""
    path = Path(source)
    if not path.is_dir():
        if not path.exists():
            raise DataError(f"no such file: {path}")
        return path
    if (path / GENERATIONS_FILE).is_file():
        return path / GENERATIONS_FILE
    if (path / RUN_FILE).is_file():
        raise DataError(
            f"the run in {path} has no {GENERATIONS_FILE} yet",
            fix=f"finish it with `hpcinfer run`, see how far it is with `hpcinfer status {path}`, or export what there is with --partial",
        )
    raise DataError(f"{path} is a folder, but not a run directory", fix=f"name a {GENERATIONS_FILE}")


@contextlib.contextmanager
def _merged(run: RunDirectory, folder: str | None, say: Callable[[str], None]) -> Iterator[Path | None]:
    """A merge of what is committed so far, in a file of its own that is gone afterwards; None where the run is complete.

    Merging reads around segments that writers compact meanwhile, and what is exported is one state of the run.
    """
    status = read_status(run, exact=True)
    if run.is_complete(status.num_rows, status.retry_round):
        yield None
        return
    try:
        scratch = tempfile.TemporaryDirectory(prefix=".export-", dir=folder)
    except OSError as error:
        raise DataError(f"cannot write in {folder}", found=error.strerror or str(error), fix="give another DEST") from error
    with scratch as name:
        bad_segments = BadSegments(run, say=say)
        path = Path(name) / GENERATIONS_FILE
        yield merge_run(run, status.num_rows, path, allow_partial=True, bad_segments=bad_segments, owner="export").path


def _open_generations(path: Path) -> GenerationFile:
    try:
        return GenerationFile(path)
    except OSError as error:
        raise DataError(f"cannot read {path}", found=error.strerror or str(error)) from error


def _prompts(run: RunDirectory | None, options: ExportOptions) -> PromptsReader:
    """The prompts of the run. Raises DataError where there are none, or they are other ones."""
    path = options.prompts or (str(run.identity.notes.get("prompts", "")) if run is not None else "")
    if not path:
        raise DataError("columns of the input need the prompts", fix="give --prompts FILE")
    reader = open_prompts(path, options.dataset or None)
    try:
        if run is not None and run.identity.sampling.get("continuation"):
            reader.read_continuations(run.identity.sampling["continuation"])
        if run is not None and (
            reader.num_rows < run.num_rows or prefix_fingerprint(reader, run.num_rows) != run.identity.input_fingerprint
        ):
            raise DataError(
                f"the generations are not of {path}", found="another fingerprint than the run's", fix="give the prompts that the run read"
            )
    except BaseException:
        reader.close()
        raise
    return reader


@contextlib.contextmanager
def _whole(destination: str, overwrite: bool) -> Iterator[BinaryIO]:
    if os.path.isdir(destination) or (os.path.exists(destination) and not overwrite):
        raise DataError(f"{destination} exists", fix="give another name, or --overwrite")
    with whole_file(destination) as temporary, open(temporary, "wb", buffering=1 << 20) as out:
        yield out


def _write(file: GenerationFile, reader: PromptsReader | None, out: BinaryIO, options: ExportOptions) -> int:
    names = list(as_entry(_NOTHING, token_ids=options.token_ids, optional=file.optional))
    inputs = None
    if reader is not None:
        meta = meta_names(options.meta_columns, reader)
        inputs = InputColumns(reader, prompts=options.prompt_text, meta=meta, taken=frozenset(names))
        names = inputs.names + names
    entries = _entries(file, inputs, options)
    if options.format == CSV:
        return write_csv(out, entries, names)
    if options.format == PARQUET:
        return write_parquet(out, entries, names, foreign=inputs.names if inputs else ())
    return write_json_lines(out, entries)


_NOTHING = Generation(row=0, status=Status.OK)


def _entries(file: GenerationFile, inputs: InputColumns | None, options: ExportOptions) -> Iterator[dict[str, Any]]:
    try:
        for generation in file:
            entry = as_entry(generation, token_ids=options.token_ids, optional=file.optional)
            yield entry if inputs is None else inputs.of(generation.row) | entry
    except OSError as error:
        raise DataError(f"cannot read {file.path}", found=str(error)) from error


def as_entry(generation: Generation, *, token_ids: bool = False, optional: Iterable[str] = ()) -> dict[str, Any]:
    """One generation as plain JSON values; every line has the same keys, so that tables can be made of them.

    Args:
        optional: the optional columns that its file has.
    """
    entry: dict[str, Any] = {
        "row": generation.row,
        "sample": generation.sample,
        "text": generation.text,
        "finish_reason": generation.finish_reason.name.lower(),
        "status": generation.status.name.lower(),
        "num_prompt_tokens": generation.num_prompt_tokens,
        "num_output_tokens": len(generation.token_ids),
        "error": generation.error or None,
    }
    if token_ids:
        entry["token_ids"] = generation.token_ids.tolist()
    return entry | json_values(generation, optional)


def _export_openai(
    file: GenerationFile,
    reader: PromptsReader,
    run: RunDirectory | None,
    out: BinaryIO,
    shown: tuple[str, str],
    options: ExportOptions,
    overwrite: bool,
    kept: Sequence[str | os.PathLike],
) -> ExportSummary:
    # Here and not above: it knows the converters, which other formats do not need.
    from hpcinfer.data.export_openai import write_openai

    if {"score", "embedding"} & set(file.optional):
        raise UsageError(
            f"the OpenAI layout has no place for the scores or embeddings of {file.path}", fix="export as jsonl, csv or parquet"
        )
    destination = Path(shown[1])
    errors = options.errors
    if not errors:
        if shown[1] == "-":
            raise UsageError("the OpenAI layout has two files", fix="give --errors FILE beside DEST -")
        errors = str(destination.with_name(f"{destination.stem}.errors{destination.suffix or '.jsonl'}"))
    if os.path.realpath(errors) == os.path.realpath(shown[1]):
        raise UsageError(f"--errors {errors} is DEST too", fix="give the error file a name of its own, or leave --errors out")
    refuse_to_replace(errors, kept)
    with _whole(errors, overwrite) as error_out:
        try:
            counts = write_openai(file, reader, run, out, error_out, model=options.model)
        except OSError as error:
            raise DataError(f"cannot read {file.path}", found=str(error)) from error
    return ExportSummary(*shown, counts.responses, file.complete, errors, counts.errors)
