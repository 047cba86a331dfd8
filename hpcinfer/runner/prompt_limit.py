"""Prompts of too many tokens: a failed row, or cut."""

from __future__ import annotations

import dataclasses

import numpy as np

from hpcinfer.errors import RowError


@dataclasses.dataclass(frozen=True, slots=True)
class PromptLimit:
    """What a job does with too long prompts (`data.truncate`, `data.max_prompt_tokens`)."""

    max_context: int
    """Longest sequence in tokens, prompt and output together."""
    max_prompt_tokens: int = 0
    """0: what leaves room for an output token."""
    truncate: str = "error"
    """error, left or right."""

    def fit(self, token_ids: np.ndarray, max_tokens: int) -> np.ndarray:
        """A prompt, cut where it is too long.

        What is cut keeps exactly `max_prompt_tokens`, where that is given, as vLLM's truncate_prompt_tokens does with "left"; else as
        much as leaves room for `max_tokens`. Special tokens at the end that is cut go too.

        Args:
            token_ids: int32 [num_tokens].
            max_tokens: of its row.

        Raises:
            RowError: it is too long, and nothing is to be cut, or nothing would be left.
        """
        longest = self.max_prompt_tokens or self.max_context - 1
        if len(token_ids) <= longest:
            return token_ids
        if self.truncate == "error":
            limit = "data.max_prompt_tokens allows" if self.max_prompt_tokens else "the context leaves room for"
            raise RowError(f"the prompt has {len(token_ids)} tokens; {limit} {longest} (data.truncate can have it cut)")
        kept = self.max_prompt_tokens or self.max_context - max_tokens
        if kept < 1:
            raise RowError(
                f"the prompt has {len(token_ids)} tokens, and max_tokens = {max_tokens} leaves it no room in a context of {self.max_context} "
                "(data.max_prompt_tokens says how much of it is kept)"
            )
        return token_ids[-kept:] if self.truncate == "left" else token_ids[:kept]

    def fit_continued(self, token_ids: np.ndarray, max_tokens: int, start: int) -> tuple[np.ndarray, int]:
        """A prompt with its continuation, which begins at place `start` and is never cut: `fit`, and where it begins then. Raises
        RowError.
        """
        fitted = self.fit(token_ids, max_tokens)
        num_cut = len(token_ids) - len(fitted)
        if num_cut and (self.truncate == "right" or start - num_cut < 1):
            raise RowError(
                f"prompt and continuation have {len(token_ids)} tokens; cut to {len(fitted)} some of the continuation would be lost"
            )
        return fitted, start - num_cut
