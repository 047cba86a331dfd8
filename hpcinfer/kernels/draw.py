"""From logits and keyed uniform numbers to tokens, by inverting the cumulative distribution in token-id order, in float64.

Shape letters: S sequences that draw, V vocabulary.
"""

from __future__ import annotations

import torch

from hpcinfer.kernels.select import uses_triton
from hpcinfer.request import NOT_A_TOKEN


def draw(logits: torch.Tensor, temperature: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """One token a row: the best one where the temperature is 0, else a draw from the whole distribution.

    Args:
        logits: float32 [S, V].
        temperature: float64 [S], 0 or more.
        uniforms: float64 [S], in [0, 1); unused where greedy.

    Returns:
        int64 [S]; of equal logits the best one is the first; NOT_A_TOKEN where the largest logit is not a finite number.
    """
    if uses_triton(logits):
        from hpcinfer.kernels import triton_draw

        return triton_draw.draw(logits, temperature, uniforms)
    tokens = logits.argmax(dim=-1)
    rows = temperature.nonzero()[:, 0]
    if len(rows):
        probs = torch.softmax(relative_logits(logits[rows], temperature[rows]), dim=-1)
        tokens[rows] = invert(probs, uniforms[rows])
    # A maximum that is not finite gives the whole row away: NaN wins every maximum.
    return tokens.masked_fill(~logits.amax(dim=-1).isfinite(), NOT_A_TOKEN)


def relative_logits(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """float64 [S, V]: (logits - the best of the row) / temperature, for logits [S, V] and temperatures above 0 float64 [S].

    Relative, so that the smallest temperature divides 0 and never makes infinity of it.
    """
    wide = logits.double()
    return (wide - wide.amax(dim=-1, keepdim=True)) / temperature[:, None]


def invert(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """int64 [S]: the first token at which the sum of probs float64 [S, V] exceeds uniforms [S] times the sum of all."""
    cumulative = probs.cumsum(dim=-1)
    target = (uniforms * cumulative[:, -1])[:, None]
    tokens = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # Rounding may push the target to the very end: the last token that has any probability is meant then.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous(), right=False)[:, 0]
    return torch.minimum(tokens, last)
