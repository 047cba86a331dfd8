"""What the leader finds out about a sequence beside its tokens, put together from what steps send it."""

from __future__ import annotations

import numpy as np

from hpcinfer.batch import Step
from hpcinfer.engine.worker import StepResults
from hpcinfer.kernels.logprobs import narrowed, unpacked
from hpcinfer.request import Request, TextScore, TokenLogprobs
from hpcinfer.scheduler.scheduler import Scheduler
from hpcinfer.scheduler.sequence import Sequence


class Findings:
    """Of one request. What is found twice, because a preempted sequence was computed again, counts once."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._drawn: list[np.ndarray] = []
        self._prompt: TokenLogprobs | None = None
        self._sums: list[tuple[int, int, np.ndarray]] = []  # first token, one past the last, sum of their hidden states

    def add_drawn(self, packed: np.ndarray) -> None:
        """Of the next token of the output: int32 [1 + 2k], k perhaps more than was asked for, see `kernels.logprobs.join_shards`."""
        self._drawn.append(narrowed(packed[None], self._request.sampling.logprobs)[0])

    def add_scored(self, start: int, packed: np.ndarray) -> None:
        """Of the prompt's tokens from place `start` on: int32 [R, 1 + 2k]."""
        num_top = self._request.sampling.prompt_logprobs or 0
        if self._prompt is None:
            self._prompt = TokenLogprobs.empty(len(self._request.prompt_token_ids), num_top)
        found, places = unpacked(narrowed(packed, num_top)), slice(start, start + len(packed))
        self._prompt.chosen[places] = found.chosen
        self._prompt.top_ids[places] = found.top_ids
        self._prompt.top[places] = found.top

    def add_pooled(self, start: int, stop: int, total: np.ndarray) -> None:
        """The sum, float64 [D], of the hidden states of the prompt's tokens from `start` on and before `stop`."""
        apart = [known for known in self._sums if known[1] <= start or stop <= known[0]]
        self._sums = [*apart, (start, stop, total.copy())]

    def score(self) -> TextScore | None:
        """Of a text that was to be scored, NaN where the model gave no numbers; None of others."""
        if self._request.task.kind != "score":
            return None
        chosen = self._prompt.chosen[self._request.score_from :]
        return TextScore(float(chosen.sum(dtype=np.float64)), len(chosen))

    def embedding(self) -> np.ndarray | None:
        """float32 [D] of a text that was to be embedded; None of others."""
        if self._request.pooled is None:
            return None
        first, last = self._request.pooled
        mean = np.sum([total for *_, total in sorted(self._sums, key=lambda known: known[0])], axis=0) / (last - first)
        if self._request.task.normalize:
            with np.errstate(invalid="ignore"):  # what is not a number stays so, and its row fails
                mean = mean / (np.linalg.norm(mean) or 1.0)
        return mean.astype(np.float32)

    def of_output(self, num_tokens: int) -> TokenLogprobs | None:
        """Of the first `num_tokens` tokens of the output, those of earlier lives included; None where nobody asked."""
        num_top, earlier = self._request.sampling.logprobs, self._request.output_logprobs
        if num_top is None:
            return None
        found = TokenLogprobs.empty(0, num_top) if earlier is None else earlier
        if self._drawn:
            found = found.followed_by(unpacked(np.stack(self._drawn)))
        return found[:num_tokens]

    def of_prompt(self) -> TokenLogprobs | None:
        """Of the prompt's tokens, nothing of the first; None where nobody asked."""
        num_top = self._request.sampling.prompt_logprobs
        if num_top is None:
            return None
        if self._request.prompt_logprobs is not None:
            return self._request.prompt_logprobs
        if self._prompt is not None:
            return self._prompt
        return TokenLogprobs.empty(len(self._request.prompt_token_ids), num_top)  # of a single token


def note(scheduler: Scheduler, step: Step, lane: int, results: StepResults) -> None:
    """Give every sequence what a lane found out about it in a step. What was found about one that has ended is dropped."""
    if results.logprobs is not None:
        ids = [step.drawing[lane][place] for place in step.asked[lane]]
        for sequence_id, packed in zip(ids, results.logprobs.wait().numpy(), strict=True):
            if (sequence := scheduler.find(sequence_id)) is not None:
                _findings(sequence).add_drawn(packed)
    if results.scored is not None:
        packed, first = results.scored.wait().numpy(), 0
        for span in step.scored[lane]:
            if (sequence := scheduler.find(span.sequence_id)) is not None:
                _findings(sequence).add_scored(span.start, packed[first : first + span.num_tokens])
            first += span.num_tokens
    if results.pooled is not None:
        for span, total in zip(step.pooled[lane], results.pooled.wait().numpy(), strict=True):
            if (sequence := scheduler.find(span.sequence_id)) is not None:
                _findings(sequence).add_pooled(span.start, span.stop, total)


def _findings(sequence: Sequence) -> Findings:
    if sequence.findings is None:
        sequence.findings = Findings(sequence.request)
    return sequence.findings
