"""A sequence: the state of one request while it is being generated, and what is left of it at its end."""

from __future__ import annotations

import array
import dataclasses
from typing import Any

import numpy as np

from hpcinfer.request import END_WITHOUT_TOKEN, NO_TOKEN_LEFT, NOT_A_TOKEN, FinishReason, Request

NEVER = -(10**9)
NO_TOKEN = {
    NOT_A_TOKEN: "the model's logits are not finite numbers",
    NO_TOKEN_LEFT: "every token is ruled out by bad_words, logit_bias, min_tokens or structured output",
    END_WITHOUT_TOKEN: "",
}
"""What may come in the place of a token -> why its row fails; "" where it is complete."""


class Sequence:
    """Mutable state of one request. Every rank of a replica holds an equal copy."""

    __slots__ = (
        "id", "request", "tokens", "num_prompt_tokens", "num_computed", "prefill_end", "owner", "is_shared", "tables",
        "last_tick", "num_awaited", "drawn_at", "num_preemptions", "edits_logits", "needs_history", "history", "stop_watch",
        "matching", "num_logprobs", "first_scored", "pooled", "findings",
    )

    def __init__(self, sequence_id: int, request: Request, *, num_lanes: int = 1) -> None:
        self.id = sequence_id
        self.request = request
        self.tokens: list[int] = [*request.prompt_token_ids.tolist(), *request.output_token_ids.tolist()]
        """Known token ids: the prompt, then the output so far."""
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_computed = 0
        """Tokens given to a step already, those in flight included."""
        self.prefill_end = 0
        """Tokens known when it was admitted last: up to here it is prefill, from here on decode."""
        self.owner = 0
        """The lane that decodes it, while it is running."""
        self.is_shared = False
        """Whether its prefill is spread over the lanes."""
        self.tables: list[array.array[int]] = [array.array("i") for _ in range(num_lanes)]
        """Its pages in every lane, in order."""
        self.last_tick = NEVER
        """The last tick that computes some of it."""
        self.num_awaited = 0
        """Tokens that steps in flight draw: they exist on a device, and are not known here."""
        self.drawn_at = (0, 0)
        """Lane of the last of them, and its place among the tokens that this lane draws in that step."""
        self.num_preemptions = 0
        self.edits_logits = request.edits_logits
        self.needs_history = request.needs_history
        self.num_logprobs = request.sampling.logprobs
        self.first_scored = request.first_scored
        self.pooled = request.pooled
        # Kept by single ranks, functions of request and tokens that can be made again at any time; no decision reads them.
        self.history: Any = None
        """On the rank that draws for it: what its logits processors have counted (`sampling.history.History`)."""
        self.stop_watch: Any = None
        """On the leader: what has been read of its text (`data.stop_text.StopWatch`)."""
        self.matching: Any = None
        """On the rank that draws for it: its place in its constraint (`sampling.masks.Matching`)."""
        self.findings: Any = None
        """On the leader: what has been found out beside its tokens (`engine.findings.Findings`)."""

    @property
    def num_to_compute(self) -> int:
        """Known tokens whose keys and values are not computed; 0 while a drawn token is awaited."""
        return len(self.tokens) - self.num_computed

    def input_token(self, position: int) -> int:
        """The token at `position` as `MicroBatch.token_ids` has it: its id, or where the device finds it."""
        return self.tokens[position] if position < len(self.tokens) else -1 - self.drawn_at[1]

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> np.ndarray:
        """int32: the output so far."""
        return np.array(self.tokens[self.num_prompt_tokens :], np.int32)

    def ends_with_awaited(self, max_context: int) -> bool:
        """True where nothing follows the tokens that are awaited, whatever they are."""
        sampling, awaited = self.request.sampling, self.num_awaited
        return self.num_output_tokens + awaited >= sampling.max_tokens or len(self.tokens) + awaited >= max_context

    def finish_reason(self, eos_token_ids: frozenset[int], max_context: int) -> FinishReason:
        """Why the sequence is over after its last token, or NONE."""
        sampling = self.request.sampling
        last = self.tokens[-1]
        if last in sampling.stop_token_ids or (last in eos_token_ids and not sampling.ignore_eos):
            return FinishReason.STOP
        if self.num_output_tokens >= sampling.max_tokens or len(self.tokens) >= max_context:
            return FinishReason.LENGTH
        return FinishReason.NONE


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EndedSequence:
    """A sequence that left the scheduler; `reason` NONE without an error means that a drain cut it short."""

    request: Request
    output_token_ids: np.ndarray
    """int32: everything generated, earlier lives included."""
    reason: FinishReason
    error: str = ""
    """Why it failed."""
    findings: Any = None
    """As of its sequence, on the leader."""

    @property
    def is_cut_short(self) -> bool:
        """True where a drain ended it."""
        return self.reason is FinishReason.NONE and not self.error

    @property
    def num_new_tokens(self) -> int:
        """Tokens generated since its request arrived; those of an earlier life are not counted."""
        if not self.request.task.generates:
            return 0
        return len(self.output_token_ids) - len(self.request.output_token_ids)
