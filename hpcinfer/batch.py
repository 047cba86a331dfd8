"""What one tick computes, as plain host data: made by the scheduler, turned into tensors by the engine.

Shape letters: N sequences in the microbatch, T tokens in it, B blocks in the longest block table.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Some sequences, each with the next of its tokens to compute.

    The tokens of a sequence are contiguous; a decode is a sequence with one token, a prefill chunk has more. A sequence
    may appear once only.
    """

    tick: int
    """The scheduler step that made it; ticks are executed in this order on every stage."""
    sequence_ids: tuple[int, ...]
    """N numbers that the scheduler gave to its sequences."""
    token_ids: np.ndarray
    """int32 [T]."""
    query_lens: np.ndarray
    """int32 [N]: tokens to compute for each sequence; they add up to T."""
    context_lens: np.ndarray
    """int32 [N]: tokens of each sequence whose keys and values are in its pages already."""
    block_tables: np.ndarray
    """int32 [N, B]: the pages of each sequence in order; unused entries are 0."""
    samples: np.ndarray
    """bool [N]: True where the chunk reaches the end of the known tokens, so that a new token is drawn."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        """N."""
        return len(self.sequence_ids)

    @property
    def is_decode(self) -> np.ndarray:
        """bool [N]: sequences that compute a single token, with a context, to draw the next; all others are prefill."""
        return (self.query_lens == 1) & self.samples & (self.context_lens > 0)

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of the sequences that are not decodes."""
        return int(self.query_lens[~self.is_decode].sum())
