"""Which experts a token is sent to, from the router's logits, and how often each is chosen.

Shape letters: T tokens, E experts of the model, k experts of a token.
"""

from __future__ import annotations

import dataclasses

import torch

from hpcinfer.kernels.select import uses_triton

NOBODY = -1
"""In the place of an expert: the token is sent to none. Any negative number is understood so."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """How a family chooses experts and weighs their outputs."""

    num_chosen: int
    """k."""
    softmax_first: bool
    """Softmax over all experts, then the k largest; otherwise softmax over the k largest."""
    normalize: bool
    """With softmax_first: the k weights are divided by their sum."""
    rounded: bool
    """The weights are rounded to the logits' dtype, as most families of transformers do."""


def choose_experts(
    logits: torch.Tensor, choice: Choice, valid: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each token.

    Args:
        logits: [T, E].
        valid: bool [T], False for tokens of padding, which are sent to nobody. None: all are tokens.

    Returns:
        Experts int64 [T, k], the best first, NOBODY where not valid; their weights float32 [T, k] (float64 where the
        logits are).
    """
    if uses_triton(logits):
        from hpcinfer.kernels import triton_routing

        return triton_routing.choose_experts(logits, choice, valid)
    wide = torch.promote_types(logits.dtype, torch.float32)
    if choice.softmax_first:
        weights, ids = torch.softmax(logits, dim=-1, dtype=wide).topk(choice.num_chosen, dim=-1)
        if choice.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
    else:
        largest, ids = logits.topk(choice.num_chosen, dim=-1)
        weights = torch.softmax(largest, dim=-1, dtype=wide)
    if valid is not None:
        ids = ids.masked_fill(~valid[:, None], NOBODY)
    return ids, weights.to(logits.dtype).to(wide) if choice.rounded else weights


def count_experts(load: torch.Tensor, ids: torch.Tensor) -> None:
    """Add to load int64 [E] how often each expert is in ids int64 [T, k]."""
    if uses_triton(ids):
        from hpcinfer.kernels import triton_routing

        triton_routing.count_experts(load, ids)
        return
    flat = ids.reshape(-1)
    load.scatter_add_(0, flat.clamp(min=0), (flat >= 0).to(load.dtype))
