"""Generations to JSON Lines, streaming."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from hpcinfer.data.generations import GenerationFile
from hpcinfer.data.hdf5 import whole_file
from hpcinfer.data.prompts.packed import BLOCK_ROWS
from hpcinfer.data.prompts.reader import PromptsReader, open_prompts
from hpcinfer.errors import DataError
from hpcinfer.request import Generation

RUN_FILE = "run.json"
GENERATIONS_FILE = "generations.h5"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """What an exported line holds beside row, sample, text, finish_reason, status, token counts and error."""

    token_ids: bool = False
    """The generated token ids, as a list. Default false."""
    prompts: str = ""
    """The prompts that were run (a file, a folder or a glob): adds each row's id. Default "": no ids."""
    dataset: str = ""
    """As in the job: where the prompts are in a foreign layout."""
    prompt_text: bool = False
    """With `prompts`: adds the prompt itself. Default false."""


@dataclasses.dataclass(frozen=True, slots=True)
class ExportSummary:
    """What was exported."""

    source: str
    destination: str
    num_rows: int
    complete: bool
    """Whether the source says that it holds every row of its run."""


def export_jsonl(
    source: str | os.PathLike,
    destination: str | os.PathLike | BinaryIO,
    options: ExportOptions | None = None,
    *,
    overwrite: bool = False,
) -> ExportSummary:
    """Writes one JSON object a generation, in the order of the file.

    Args:
        source: a generations file, a segment, or a run directory (its generations.h5).
        destination: the file to appear, whole or not at all; or an open binary stream.
        options: what each line holds.
        overwrite: replace an existing destination.
    Raises:
        DataError: the source is not there or damaged, the prompts are not those it came from, the destination exists.
    """
    options = options or ExportOptions()
    if options.prompt_text and not options.prompts:
        raise DataError("prompt texts need the prompts", fix="give --prompts FILE beside --prompt-text")
    path = generations_path(source)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_open_generations(path))
        prompts = None
        if options.prompts:
            prompts = stack.enter_context(open_prompts(options.prompts, options.dataset or None))
        lines = _lines(file, prompts, options)
        if not isinstance(destination, str | os.PathLike):
            num_rows = sum(destination.write(line) > 0 for line in lines)
            return ExportSummary(str(path), "-", num_rows, file.complete)
        if os.path.isdir(destination) or (os.path.exists(destination) and not overwrite):
            raise DataError(f"{os.fspath(destination)} exists", fix="give another name, or --overwrite")
        with whole_file(destination) as temporary, open(temporary, "wb", buffering=1 << 20) as out:
            num_rows = sum(out.write(line) > 0 for line in lines)
    return ExportSummary(str(path), os.fspath(destination), num_rows, file.complete)


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
            fix=f"finish it with `hpcinfer run`, or see how far it is with `hpcinfer status {path}`",
        )
    raise DataError(f"{path} is a folder, but not a run directory", fix=f"name a {GENERATIONS_FILE}")


def _open_generations(path: Path) -> GenerationFile:
    try:
        return GenerationFile(path)
    except OSError as error:
        raise DataError(f"cannot read {path}", found=error.strerror or str(error)) from error


def _lines(file: GenerationFile, prompts: PromptsReader | None, options: ExportOptions) -> Iterator[bytes]:
    inputs = _Inputs(prompts, options.prompt_text) if prompts is not None else None
    try:
        for generation in file:
            entry = as_entry(generation, token_ids=options.token_ids)
            if inputs is not None:
                entry = inputs.of(generation.row) | entry
            yield json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    except OSError as error:
        raise DataError(f"cannot read {file.path}", found=str(error)) from error


def as_entry(generation: Generation, *, token_ids: bool = False) -> dict[str, Any]:
    """One generation as plain JSON values; every line has the same keys, so that tables can be made of them."""
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
    return entry


class _Inputs:
    """Ids and prompts of rows that come in ascending order, read block by block."""

    def __init__(self, reader: PromptsReader, with_prompt: bool) -> None:
        self._reader = reader
        self._with_prompt = with_prompt
        # Blocks with prompts are smaller, because a row may be long.
        self._block_rows = 256 if with_prompt else BLOCK_ROWS
        self._first = 0
        self._block: list[dict[str, Any]] = []

    def of(self, row: int) -> dict[str, Any]:
        """The input columns of a row."""
        if not self._first <= row < self._first + len(self._block):
            if row >= self._reader.num_rows:
                raise DataError(
                    f"the generations are not of {self._reader.paths[0]}",
                    found=f"row {row}, but {self._reader.num_rows} prompts",
                    fix="give the prompts that the run read",
                )
            self._first = row - row % self._block_rows
            self._read(min(self._first + self._block_rows, self._reader.num_rows))
        return self._block[row - self._first]

    def _read(self, stop: int) -> None:
        self._block = [{"id": id} for id in self._reader.ids(self._first, stop)]
        if self._with_prompt:
            for entry, row in zip(self._block, self._reader.rows(self._first, stop), strict=True):
                entry["prompt"] = row.text if row.token_ids is None else row.token_ids.tolist()
