"""The choice of experts, one program a token. See `routing`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hpcinfer.kernels.routing import NOBODY, Choice
from hpcinfer.kernels.triton_common import power_of_two, rounded

_PAIRS = 1024
_NOBODY = tl.constexpr(NOBODY)


def choose_experts(
    logits: torch.Tensor, choice: Choice, valid: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `routing.choose_experts`; of equal logits the first is chosen."""
    num_tokens, num_experts = logits.shape
    assert logits.is_contiguous()
    ids = torch.empty(num_tokens, choice.num_chosen, dtype=torch.int64, device=logits.device)
    weights = torch.empty(num_tokens, choice.num_chosen, dtype=torch.float32, device=logits.device)
    if num_tokens:
        _choose_kernel[(num_tokens,)](
            logits, valid, ids, weights, NUM_EXPERTS=num_experts, NUM_CHOSEN=choice.num_chosen,
            BLOCK=power_of_two(num_experts), BLOCK_CHOSEN=power_of_two(choice.num_chosen),
            SOFTMAX_FIRST=choice.softmax_first, NORMALIZE=choice.normalize, ROUNDED=choice.rounded,
            MASKED=valid is not None, num_warps=1, enable_fp_fusion=False,
        )
    return ids, weights


def count_experts(load: torch.Tensor, ids: torch.Tensor) -> None:
    """As `routing.count_experts`."""
    assert ids.is_contiguous()
    num_pairs = ids.numel()
    if num_pairs:
        _count_kernel[(triton.cdiv(num_pairs, _PAIRS),)](
            load, ids, num_pairs, BLOCK=_PAIRS, num_warps=4, enable_fp_fusion=False
        )


@triton.jit(do_not_specialize=["num_pairs"])
def _count_kernel(load, ids, num_pairs, BLOCK: tl.constexpr):
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + pair, mask=pair < num_pairs, other=-1)
    tl.atomic_add(load + expert, tl.full([BLOCK], 1, tl.int64), mask=expert >= 0)


@triton.jit
def _choose_kernel(
    logits, valid, ids, weights, NUM_EXPERTS: tl.constexpr, NUM_CHOSEN: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_CHOSEN: tl.constexpr, SOFTMAX_FIRST: tl.constexpr, NORMALIZE: tl.constexpr, ROUNDED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    dtype = logits.dtype.element_ty
    value = tl.load(logits + token * NUM_EXPERTS + expert, mask=expert < NUM_EXPERTS, other=float("-inf"))
    value = value.to(tl.float32)
    # A maximum does not see NaN. As infinity it is chosen, is an expert of the model, and makes NaN of every weight.
    left = tl.where(value != value, float("inf"), value)
    place = tl.arange(0, BLOCK_CHOSEN)
    chosen = tl.full([BLOCK_CHOSEN], -1, tl.int32)
    logit = tl.full([BLOCK_CHOSEN], float("-inf"), tl.float32)
    for i in tl.static_range(NUM_CHOSEN):
        largest, index = tl.max(left, axis=0, return_indices=True, return_indices_tie_break_left=True)
        chosen = tl.where(place == i, index, chosen)
        logit = tl.where(place == i, largest, logit)
        left = tl.where(expert == index, float("-inf"), left)
    best = tl.max(logit, axis=0)
    weight = tl.exp(logit - best)
    if SOFTMAX_FIRST:
        weight = weight / tl.sum(tl.exp(value - best), axis=0)
        if NORMALIZE:
            weight = weight / tl.sum(weight, axis=0)
    else:
        weight = weight / tl.sum(weight, axis=0)
    if ROUNDED:
        weight = rounded(weight, dtype).to(tl.float32)
    if MASKED:
        chosen = tl.where(tl.load(valid + token), chosen, _NOBODY)
    at = token * NUM_CHOSEN + place
    tl.store(ids + at, chosen.to(tl.int64), mask=place < NUM_CHOSEN)
    tl.store(weights + at, weight, mask=place < NUM_CHOSEN)
