"""From what leaves the scheduler to output rows."""

from __future__ import annotations

import numpy as np

from hpcinfer.data.stop_text import final_text
from hpcinfer.data.tokenize import Tokenizer
from hpcinfer.engine.findings import Findings
from hpcinfer.request import Generation, Request, Status
from hpcinfer.scheduler.scheduler import EndedSequence


def generation_of(ended: EndedSequence, tokenizer: Tokenizer | None) -> Generation:
    """The output row of a sequence that ended, failed, or was cut short by a drain (status PARTIAL)."""
    request = ended.request
    if ended.error:
        return failed_generation(request.row, request.sample, ended.error, len(request.prompt_token_ids))
    findings = ended.findings or Findings(request)
    if not request.task.generates and not ended.is_cut_short:
        return _judged(request, findings)
    return Generation(
        row=request.row,
        sample=request.sample,
        status=Status.PARTIAL if ended.is_cut_short else Status.OK,
        finish_reason=ended.reason,
        token_ids=ended.output_token_ids,
        text=final_text(tokenizer, ended.output_token_ids, request.sampling) if tokenizer else "",
        num_prompt_tokens=len(request.prompt_token_ids),
        logprobs=findings.of_output(len(ended.output_token_ids)),
        prompt_logprobs=findings.of_prompt(),
    )


def _judged(request: Request, findings: Findings) -> Generation:
    """The output row of a text that was scored or embedded."""
    num_tokens, score, embedding = len(request.prompt_token_ids), findings.score(), findings.embedding()
    if not np.isfinite(embedding if score is None else score.logprob).all():
        return failed_generation(request.row, request.sample, "what the model makes of it is not finite numbers", num_tokens)
    return Generation(
        row=request.row, sample=request.sample, status=Status.OK, num_prompt_tokens=num_tokens,
        prompt_logprobs=findings.of_prompt(), score=score, embedding=embedding,
    )


def failed_generation(row: int, sample: int, error: str, num_prompt_tokens: int = 0) -> Generation:
    """The output row of a (row, sample) that cannot be run."""
    return Generation(
        row=row, sample=sample, status=Status.FAILED, error=error, num_prompt_tokens=num_prompt_tokens
    )
