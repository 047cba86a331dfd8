"""Filters of the distribution: top-k, top-p, min-p, in the order and by the definitions of transformers' processors.

Shape letters: S sequences that draw, V vocabulary.
"""

from __future__ import annotations

import torch


def probabilities(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """The filtered distribution to draw from; rows need not add up to 1.

    Args:
        logits: float [S, V].
        temperature: float64 [S], above 0.
        top_k: int64 [S], 0 is off.
        top_p: float64 [S], 1 is off.
        min_p: float64 [S], 0 is off.

    Returns:
        float64 [S, V].
    """
    # Relative to the best logit, so that the smallest temperature divides 0 and never makes infinity of it.
    relative = logits.double()
    scaled = (relative - relative.amax(dim=-1, keepdim=True)) / temperature[:, None]
    if bool((top_k > 0).any()):
        scaled = _keep_top_k(scaled, top_k)
    probs = torch.softmax(scaled, dim=-1)
    if bool((top_p < 1).any()):
        probs = _keep_top_p(probs, top_p)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    if bool((min_p > 0).any()):
        threshold = min_p[:, None] * probs.amax(dim=-1, keepdim=True)
        probs = probs.masked_fill(probs < threshold, 0.0)
    return probs


def _keep_top_k(scaled: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """Rule out all below the k-th largest logit; ties with it stay."""
    vocabulary = scaled.shape[-1]
    kept = torch.where(top_k > 0, top_k, vocabulary).clamp(max=vocabulary)
    largest = scaled.topk(int(kept.max()), dim=-1).values
    threshold = largest.gather(1, (kept - 1)[:, None])
    return scaled.masked_fill(scaled < threshold, float("-inf"))


def _keep_top_p(probs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Keep the fewest most likely tokens whose probabilities reach top_p; the best one always stays."""
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered  # probability of all that are more likely
    dropped = (before >= top_p[:, None]) & (top_p[:, None] < 1)
    dropped[:, 0] = False
    return probs.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), 0.0)
