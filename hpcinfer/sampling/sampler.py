"""The sampler: one token for each sequence that reached the end of its known tokens.

Shape letters: S sequences that draw, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import torch

from hpcinfer.request import NOT_A_TOKEN, Request
from hpcinfer.sampling.logits import probabilities
from hpcinfer.sampling.rng import keyed_uniform


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplingBatch:
    """The sampling parameters and draw keys of S sequences, as arrays."""

    temperature: np.ndarray
    """float64 [S]; 0 is greedy."""
    top_k: np.ndarray
    """int64 [S]."""
    top_p: np.ndarray
    """float64 [S]."""
    min_p: np.ndarray
    """float64 [S]."""
    uniforms: np.ndarray
    """float64 [S]: the keyed draw of each; unused where greedy."""

    @classmethod
    def of(cls, draws: Iterable[tuple[Request, int]]) -> SamplingBatch:
        """From (request, position of the token to draw, counted from the start of the prompt) of each sequence."""
        draws = list(draws)
        params = [request.sampling for request, _ in draws]
        return cls(
            temperature=np.array([p.temperature for p in params], np.float64),
            top_k=np.array([p.top_k for p in params], np.int64),
            top_p=np.array([p.top_p for p in params], np.float64),
            min_p=np.array([p.min_p for p in params], np.float64),
            uniforms=keyed_uniform(
                np.array([p.seed for p in params], np.uint64),
                np.array([request.row for request, _ in draws], np.uint64),
                np.array([request.sample for request, _ in draws], np.uint64),
                np.array([position for _, position in draws], np.uint64),
            ),
        )


def sample(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Draw one token a row by inverting the cumulative distribution in token-id order, in float64.

    Args:
        logits: float32 [S, V].
        batch: parameters and draws of the S rows.

    Returns:
        int64 [S] on the device of `logits`; NOT_A_TOKEN where the logits are not numbers.
    """
    tokens = logits.argmax(dim=-1)
    drawn = np.flatnonzero(batch.temperature > 0)
    if len(drawn):
        rows = torch.from_numpy(drawn).to(logits.device)
        tokens[rows] = _draw(logits[rows], batch, drawn)
    # A maximum that is not finite gives the whole row away: NaN wins every maximum.
    return tokens.masked_fill(~logits.amax(dim=-1).isfinite(), NOT_A_TOKEN)


def _draw(logits: torch.Tensor, batch: SamplingBatch, drawn: np.ndarray) -> torch.Tensor:
    temperature, top_k, top_p, min_p, uniforms = (
        torch.from_numpy(array[drawn]).to(logits.device)
        for array in (batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.uniforms)
    )
    cumulative = probabilities(logits, temperature, top_k, top_p, min_p).cumsum(dim=-1)
    target = (uniforms * cumulative[:, -1])[:, None]
    tokens = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # Rounding may push the target to the very end: the last token that has any probability is meant then.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous(), right=False)[:, 0]
    return torch.minimum(tokens, last)
