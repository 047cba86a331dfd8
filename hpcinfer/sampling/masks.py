"""Masks of the tokens that constraints allow: filled by a thread while the step computes, applied where the logits are.

Shape letters: S sequences that draw, R of them that have a constraint, V vocabulary, W words of 32 tokens.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from hpcinfer.request import END_WITHOUT_TOKEN, Request
from hpcinfer.sampling.grammar import Grammars, Matcher


class Matching:
    """What a rank keeps of a sequence with a constraint between its draws: a function of the request and of its known tokens,
    whatever happened in between (preemption, another lane, an earlier life)."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._num_taken = len(request.prompt_token_ids)
        self._matcher: Matcher | None = None  # the thread's alone

    def take(self, tokens: Sequence[int]) -> list[int]:
        """Those of the sequence's known token ids, prompt first, that were not taken before."""
        start, self._num_taken = self._num_taken, len(tokens)
        return list(tokens[start:])

    def advance(self, grammars: Grammars, new_tokens: list[int]) -> Matcher:
        """Go on by tokens."""
        if self._matcher is None:
            sampling = self.request.sampling
            self._matcher = grammars.matcher(sampling.constraint, may_end=not sampling.ignore_eos)
        if new_tokens:
            self._matcher.consume(new_tokens)
        return self._matcher


@dataclasses.dataclass(frozen=True, slots=True)
class _Filled:
    """Masks in host memory."""

    words: torch.Tensor
    """int32 [R, W], pinned where a device reads it."""
    instead: tuple[tuple[int, int], ...]
    """(row of the logits, what is returned in place of a token)."""


class PendingMasks:
    """The masks of a step, on their way."""

    def __init__(self, rows: list[int], filled: concurrent.futures.Future[_Filled]) -> None:
        self.rows = np.array(rows, np.int64)
        """int64 [R]: rows of the logits."""
        self._filled = filled

    def done(self) -> bool:
        """Whether `apply` would not wait."""
        return self._filled.done()

    def apply(self, logits: torch.Tensor) -> None:
        """Rule out what the constraints do not allow, in float32 [S, V], in place. Waits for the thread, not for the device."""
        words = self._filled.result().words.to(logits.device, non_blocking=True)
        # As bytes: what is unpacked then takes V bytes a row.
        shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
        allowed = (words.view(torch.uint8)[:, :, None] >> shifts) & 1
        ruled_out = allowed.flatten(1)[:, : logits.shape[-1]] == 0
        if len(self.rows) == len(logits):
            logits.masked_fill_(ruled_out, -torch.inf)
            return
        rows = torch.from_numpy(self.rows).to(logits.device, non_blocking=True)
        logits[rows] = logits[rows].masked_fill(ruled_out, -torch.inf)

    def settle(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [S] drawn from such logits -> the same, with what constraints want said in place of a token."""
        instead = self._filled.result().instead
        if not instead:
            return tokens
        rows, values = (torch.tensor(column, device=tokens.device) for column in zip(*instead, strict=True))
        return tokens.index_copy(0, rows, values)


class TokenMasks:
    """Fills masks in a thread of its own, in the order of the steps.

    Args:
        grammars: of the model.
        device: where the logits will be.
    """

    def __init__(self, grammars: Grammars, device: torch.device) -> None:
        self._grammars = grammars
        self._pinned = device.type == "cuda"
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="masks")

    def start(self, draws: Iterable[tuple[Matching | None, Sequence[int]]]) -> PendingMasks | None:
        """Begin with the masks of a step.

        Args:
            draws: of every sequence that draws its matching (None without a constraint) and its known token ids, prompt first.

        Returns:
            None where no sequence has a constraint.
        """
        work = [(row, matching, matching.take(tokens)) for row, (matching, tokens) in enumerate(draws) if matching is not None]
        if not work:
            return None
        return PendingMasks([row for row, _, _ in work], self._thread.submit(self._fill, work))

    def close(self) -> None:
        """End the thread. What it was given is filled first."""
        self._thread.shutdown()

    def _fill(self, work: list[tuple[int, Matching, list[int]]]) -> _Filled:
        matchers = [matching.advance(self._grammars, tokens) for _, matching, tokens in work]
        words = torch.zeros(len(work), self._grammars.mask_words, dtype=torch.int32, pin_memory=self._pinned)
        instead = self._grammars.fill(matchers, words.numpy())
        # A mask without a token says so by itself, but not that the text is complete.
        rows = (row for (row, _, _), value in zip(work, instead, strict=True) if value == END_WITHOUT_TOKEN)
        return _Filled(words, tuple((row, END_WITHOUT_TOKEN) for row in rows))
