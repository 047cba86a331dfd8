"""Filters of the distribution: top-k, top-p, min-p, in the order and by the definitions of transformers' processors.

Shape letters: S sequences that draw, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from hpcinfer.kernels.draw import relative_logits


def on_device(arrays: Iterable[np.ndarray], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Host arrays as tensors on `device`, without waiting for what it still computes."""
    return tuple(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)


def probabilities(
    logits: torch.Tensor, *, temperature: np.ndarray, top_k: np.ndarray, top_p: np.ndarray, min_p: np.ndarray
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
    # Which filters are on is decided by the host's arrays: asking a tensor would wait for the device.
    heat, most, mass, least = on_device((temperature, top_k, top_p, min_p), logits.device)
    scaled = relative_logits(logits, heat)
    if (top_k > 0).any():
        scaled = _keep_top_k(scaled, most, longest=min(int(top_k.max()), scaled.shape[-1]))
    probs = torch.softmax(scaled, dim=-1)
    if (top_p < 1).any():
        probs = _keep_top_p(probs, mass)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    if (min_p > 0).any():
        threshold = least[:, None] * probs.amax(dim=-1, keepdim=True)
        probs = probs.masked_fill(probs < threshold, 0.0)
    return probs


def _keep_top_k(scaled: torch.Tensor, top_k: torch.Tensor, *, longest: int) -> torch.Tensor:
    """Rule out all below the k-th largest logit; ties with it stay. `longest`: the largest k, at most V."""
    largest = scaled.topk(longest, dim=-1).values
    threshold = largest.gather(1, top_k.clamp(1, longest)[:, None] - 1)
    threshold = threshold.masked_fill((top_k == 0)[:, None], float("-inf"))
    return scaled.masked_fill(scaled < threshold, float("-inf"))


def _keep_top_p(probs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Keep the fewest most likely tokens whose probabilities reach top_p; the best one always stays."""
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered  # probability of all that are more likely
    dropped = (before >= top_p[:, None]) & (top_p[:, None] < 1)
    dropped[:, 0] = False
    return probs.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), 0.0)
