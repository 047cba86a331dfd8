"""The sampler: one token for each sequence that reached the end of its known tokens.

Shape letters: S sequences that draw, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import torch

from hpcinfer.kernels.draw import draw, invert
from hpcinfer.request import NOT_A_TOKEN, Request
from hpcinfer.sampling.logits import on_device, probabilities
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

    @property
    def is_filtered(self) -> np.ndarray:
        """bool [S]: drawn from a part of the distribution."""
        return (self.temperature > 0) & ((self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0))

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

    Waits for no device: which rows are filtered is known on the host.

    Args:
        logits: float32 [S, V].
        batch: parameters and draws of the S rows.

    Returns:
        int64 [S] on the device of `logits`; NOT_A_TOKEN where the logits are not numbers.
    """
    filtered = np.flatnonzero(batch.is_filtered)
    # Filtered rows are drawn below; here they are only looked at for what is not a number.
    temperature = np.where(batch.is_filtered, 0.0, batch.temperature)
    tokens = draw(logits, *on_device((temperature, batch.uniforms), logits.device))
    if len(filtered):
        (rows,) = on_device((filtered,), logits.device)
        drawn = _draw_filtered(logits[rows], batch, filtered)
        tokens[rows] = torch.where(tokens[rows] == NOT_A_TOKEN, NOT_A_TOKEN, drawn)
    return tokens


def _draw_filtered(logits: torch.Tensor, batch: SamplingBatch, rows: np.ndarray) -> torch.Tensor:
    """logits of `rows` of the batch -> their tokens."""
    probs = probabilities(
        logits, temperature=batch.temperature[rows], top_k=batch.top_k[rows], top_p=batch.top_p[rows],
        min_p=batch.min_p[rows],
    )
    return invert(probs, *on_device((batch.uniforms[rows],), logits.device))
