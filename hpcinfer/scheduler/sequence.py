"""A sequence: the state of one request while it is being generated."""

from __future__ import annotations

import numpy as np

from hpcinfer.request import FinishReason, Request

NEVER = -(10**9)


class Sequence:
    """Mutable state of one request. Every rank of a replica holds an equal copy."""

    __slots__ = ("id", "request", "tokens", "num_prompt_tokens", "num_computed", "blocks", "last_tick", "num_preemptions")

    def __init__(self, sequence_id: int, request: Request) -> None:
        self.id = sequence_id
        self.request = request
        self.tokens: list[int] = [*request.prompt_token_ids.tolist(), *request.output_token_ids.tolist()]
        """Known token ids: the prompt, then the output so far."""
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_computed = 0
        """Tokens given to a microbatch already, those in flight included."""
        self.blocks: list[int] = []
        self.last_tick = NEVER
        """The last tick that computes some of it."""
        self.num_preemptions = 0

    @property
    def num_to_compute(self) -> int:
        """Known tokens whose keys and values are not computed; 0 while a drawn token is awaited."""
        return len(self.tokens) - self.num_computed

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> np.ndarray:
        """int32: the output so far."""
        return np.array(self.tokens[self.num_prompt_tokens :], np.int32)

    def finish_reason(self, eos_token_ids: frozenset[int], max_context: int) -> FinishReason:
        """Why the sequence is over after its last token, or NONE."""
        sampling = self.request.sampling
        last = self.tokens[-1]
        if last in sampling.stop_token_ids or (last in eos_token_ids and not sampling.ignore_eos):
            return FinishReason.STOP
        if self.num_output_tokens >= sampling.max_tokens or len(self.tokens) >= max_context:
            return FinishReason.LENGTH
        return FinishReason.NONE
