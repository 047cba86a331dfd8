"""What one tick computes, as plain host data: made by the scheduler, turned into tensors by the models.

A tick computes one `Step`: one microbatch, or two whose segments interleave (two-batch overlap). With several lanes
(sequence parallelism) each lane has microbatches of its own in the step, some of them perhaps without tokens.

Shape letters: N entries in the microbatch, T tokens in it, B blocks in the longest block table, X shared tokens of all
lanes together.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What is read from the last hidden states of a microbatch, beside the logits that tokens are drawn from."""

    targets: np.ndarray
    """int64 [T]: the token whose log-probability after each token is wanted; -1 where none is."""
    num_top: int = 0
    """So many of the most likely tokens have theirs read too."""
    pools: tuple[tuple[int, int], ...] = ()
    """First and one past the last of the tokens whose hidden states are added up, for each sum that is wanted."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Entries, each a run of consecutive tokens of one sequence, to be computed by the ranks of one lane.

    A decode is an entry with one token, a prefill chunk has more. A sequence has one entry, except where its tokens are
    spread over lanes: then a lane may have several runs of it.
    """

    tick: int
    """The tick that computes it; ticks are executed in this order on every stage."""
    part: int = 0
    """0 or 1: which microbatch of its step."""
    is_prefill: bool = True
    """False where no lane computes anything but decodes in this part of the step."""
    sequence_ids: tuple[int, ...]
    """N numbers that the scheduler gave to its sequences."""
    token_ids: np.ndarray
    """int32 [T]. A negative one, -1 - i, is not known on the host yet: it is the i-th token that this lane draws in the step
    before (`SchedulerLimits.run_ahead`)."""
    query_lens: np.ndarray
    """int32 [N]: tokens to compute for each sequence; they add up to T."""
    context_lens: np.ndarray
    """int32 [N]: tokens of the sequence before the entry: position of its first token. Their keys and values are in the
    pages when attention reads them."""
    block_tables: np.ndarray
    """int32 [N, B]: the pages of each sequence in order; unused entries are 0."""
    samples: np.ndarray
    """bool [N]: True where the entry reaches the end of the known tokens, so that a new token is drawn."""
    num_prefill_tokens: int = 0
    """Tokens of the entries that are not decodes."""
    lane_tokens: tuple[int, ...] = ()
    """T of this part in every lane, which all ranks know: collectives over lanes are padded to the largest. Default: one
    lane."""
    shared_lens: tuple[int, ...] = ()
    """Of every lane the number of its first tokens whose keys and values all lanes need (sequence parallelism). Empty
    where nothing is shared."""
    shared_slots: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    """int64 [X]: slot (block * block size + offset) in this lane's pages of every lane's shared tokens, lane 0's first."""

    reading: Reading | None = None
    """Only the last stage looks at it."""

    def __post_init__(self) -> None:
        if not self.lane_tokens:
            object.__setattr__(self, "lane_tokens", (self.num_tokens,))

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)

    @property
    def num_entries(self) -> int:
        """N."""
        return len(self.sequence_ids)


class Span(NamedTuple):
    """Consecutive tokens of a sequence."""

    sequence_id: int
    start: int
    """Place of the first one."""
    stop: int
    """One past the last."""

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What one tick computes on the ranks of one lane, and what it draws on all of them."""

    tick: int
    parts: tuple[MicroBatch, ...]
    """One microbatch, or two that interleave; the same number on every lane."""
    drawing: tuple[tuple[int, ...], ...]
    """For every lane, the sequences for which its sampler draws a token, in the order of its logits."""
    asked: tuple[tuple[int, ...], ...] = ()
    """For every lane, the places in `drawing` of those whose token's log-probability is wanted. Empty where none is on any lane."""
    num_asked_top: int = 0
    """So many of the most likely tokens have theirs found too, at each of these places."""
    scored: tuple[tuple[Span, ...], ...] = ()
    """For every lane, the tokens whose log-probabilities it reads, in the order in which it does. Empty where there are none."""
    num_scored_top: int = 0
    """As `num_asked_top`, for these tokens."""
    pooled: tuple[tuple[Span, ...], ...] = ()
    """For every lane, the tokens whose hidden states it adds up, a sum for each span. Empty where there are none."""

    @property
    def num_tokens(self) -> int:
        """Tokens of this lane."""
        return sum(part.num_tokens for part in self.parts)
