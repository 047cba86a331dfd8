"""Generations in the layout of OpenAI's batch output: a file of responses, and a file of what became no response.

Every line of the batch appears once, in one of the two: answered rows as responses; failed and unfinished rows, and the lines
that `convert` rejected, as errors. All ids follow from the run and the row, so exporting again gives the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from hpcinfer.data.prompts.rejects import stated_rejects
from hpcinfer.data.convert.openai import META
from hpcinfer.data.convert.openai_body import CHAT_URL, COMPLETIONS_URL, INVALID
from hpcinfer.data.export_inputs import InputColumns
from hpcinfer.data.export_logprobs import LogprobWriter
from hpcinfer.data.export_tables import json_line
from hpcinfer.data.generations import GenerationFile
from hpcinfer.data.ledger.run_directory import RunDirectory
from hpcinfer.data.prompts.reader import PromptsReader
from hpcinfer.data.tokenize import Tokenizer
from hpcinfer.errors import DataError
from hpcinfer.request import Generation, Status

ROW_FAILED = "row_failed"
UNFINISHED = "unfinished"


@dataclasses.dataclass(slots=True)
class OpenAiCounts:
    """Lines written."""

    responses: int = 0
    errors: int = 0


def write_openai(
    file: GenerationFile, reader: PromptsReader, run: RunDirectory | None, out: BinaryIO, errors: BinaryIO, *, model: str = ""
) -> OpenAiCounts:
    """Writes both files.

    Args:
        file: the generations, complete or not.
        reader: the prompts that were run, converted with `--format openai` (or any: rows without a name are "row-N").
        run: where known: its number of samples, its model and its time of creation.
        model: a folder with the tokenizer, for log-probabilities; by default that of the run.
    Raises:
        CheckpointError: there are log-probabilities, and no tokenizer in the folder.
        DataError: a reject file that belongs to the prompts is not there or not whole.
    """
    counts = OpenAiCounts()
    layout = _Layout(file.run_uuid, run, model)
    has_meta = META in reader.meta_names()
    inputs = InputColumns(reader, meta=(META,) if has_meta else ())
    groups = _groups(file)
    row, samples = next(groups, (-1, []))
    for number in range(reader.num_rows):
        mine: list[Generation] = []
        if number == row:
            mine = samples
            row, samples = next(groups, (-1, []))
        entry = inputs.of(number)
        line = entry.get(META) if isinstance(entry.get(META), dict) else {}
        custom_id = entry["id"] or f"row-{number}"
        problem = layout.problem(mine)
        if problem is None:
            out.write(json_line(layout.response(number, custom_id, line, mine)))
            counts.responses += 1
        else:
            errors.write(json_line(layout.error(f"row {number}", custom_id, *problem)))
            counts.errors += 1
    if row >= 0:
        inputs.of(row)  # raises: the generations are of other prompts
    for reject in stated_rejects(reader.paths):
        place = f"{reject['source']} line {reject.get('line', reject.get('row'))}"
        code, message = reject.get("code") or INVALID, f"line {reject.get('line', reject.get('row'))}: {reject['reason']}"
        errors.write(json_line(layout.error(place, reject.get("id"), code, message)))
        counts.errors += 1
    return counts


def _groups(file: GenerationFile) -> Iterator[tuple[int, list[Generation]]]:
    """(row, its samples) in ascending order."""
    row, samples = -1, []
    for generation in file:
        if generation.row != row and samples:
            yield row, samples
            samples = []
        row = generation.row
        samples.append(generation)
    if samples:
        yield row, samples


class _Layout:
    """Lines of both files."""

    def __init__(self, run_uuid: str, run: RunDirectory | None, model: str) -> None:
        self._run_uuid = run_uuid
        self._folder = model or ("" if run is None else str(run.identity.notes.get("model", "")))
        self._logprobs: LogprobWriter | None = None
        self._num_samples = None if run is None else run.num_samples
        self._created = 0
        self._model = ""
        if run is not None:
            self._model = os.path.basename(os.path.normpath(str(run.identity.notes.get("model", ""))))
            with contextlib.suppress(ValueError):
                self._created = int(datetime.datetime.fromisoformat(run.created).timestamp())

    def problem(self, samples: Sequence[Generation]) -> tuple[str, str] | None:
        """(code, message) of a row that has no response."""
        for generation in samples:
            if generation.status == Status.FAILED:
                return ROW_FAILED, generation.error or "the row failed"
        num_ok = sum(generation.status == Status.OK for generation in samples)
        wanted = max(1, len(samples)) if self._num_samples is None else self._num_samples
        return None if num_ok == wanted else (UNFINISHED, f"{num_ok} of {wanted} answers are there; the run is not complete")

    def _id(self, prefix: str, place: str) -> str:
        return f"{prefix}{hashlib.sha256(f'{self._run_uuid} {place}'.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}"

    def response(self, row: int, custom_id: str, line: dict[str, Any], samples: Sequence[Generation]) -> dict[str, Any]:
        """A line of the output file."""
        place = f"row {row}"
        chat = line.get("url", COMPLETIONS_URL) == CHAT_URL
        num_prompt = samples[0].num_prompt_tokens
        num_output = sum(len(generation.token_ids) for generation in samples)
        body = {
            "id": self._id("chatcmpl-" if chat else "cmpl-", place),
            "object": "chat.completion" if chat else "text_completion",
            "created": self._created,
            "model": line.get("model") or self._model,
            "choices": [self._choice(one, chat) for one in samples],
            "usage": {"prompt_tokens": num_prompt, "completion_tokens": num_output, "total_tokens": num_prompt + num_output},
            "system_fingerprint": None,
        }
        response = {"status_code": 200, "request_id": self._id("req_", place), "body": body}
        return {"id": self._id("batch_req_", place), "custom_id": custom_id, "response": response, "error": None}

    def _choice(self, generation: Generation, chat: bool) -> dict[str, Any]:
        logprobs = None
        if generation.logprobs is not None:
            if self._logprobs is None:
                self._logprobs = LogprobWriter(Tokenizer(self._folder))
            logprobs = self._logprobs.chat(generation) if chat else self._logprobs.completion(generation)
        answer = {"text": generation.text}
        if chat:
            answer = {"message": {"role": "assistant", "content": generation.text, "refusal": None}}
        reason = generation.finish_reason.name.lower()
        return {"index": generation.sample, **answer, "logprobs": logprobs, "finish_reason": reason}

    def error(self, place: str, custom_id: str | None, code: str, message: str) -> dict[str, Any]:
        """A line of the error file."""
        error = {"code": code, "message": message}
        return {"id": self._id("batch_req_", place), "custom_id": custom_id, "response": None, "error": error}
