"""The gated MLPs of the experts that a rank holds, for the tokens that are sent to them.

Shape letters: T tokens, M (token, expert) pairs that this rank computes, D model, k experts of a token, E experts of
the model, L of them on this rank, I intermediate size of an expert on this rank.
"""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import torch

from hpcinfer.kernels.gate import Gate, gate_up_product
from hpcinfer.kernels.mxfp4 import unpack
from hpcinfer.kernels.select import uses_triton

Matrices: TypeAlias = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""One matrix an expert: [L, rows, columns], or, in MXFP4, blocks uint8 [L, rows, columns / 32, 16] and scales uint8
[L, rows, columns / 32]."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExpertWeights:
    """What a rank holds of a layer's experts."""

    num_experts: int
    """E."""
    first: int
    """Number in the model of the first expert that is here; the others follow it."""
    num_local: int
    """L."""
    size: int
    """I."""
    hidden: int
    """D."""
    gate_up: Matrices
    """2I rows and D columns: gate's rows, then up's."""
    down: Matrices
    """D rows and I columns."""
    gate_up_bias: torch.Tensor | None
    """[L, 2I]."""
    down_bias: torch.Tensor | None
    """[L, D]."""
    gate: Gate
    """What becomes of gate and up."""


def expert_outputs(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: ExpertWeights
) -> torch.Tensor:
    """The weighted sum of the outputs of the experts that are here, zero for a token that is sent to none of them.

    Args:
        x: [T, D].
        ids: int64 [T, k], numbers in the whole model; a negative one is nobody.
        weights: float32 [T, k].
        experts: of this rank.

    Returns:
        [T, D] in x's dtype, summed in float32 and rounded once.
    """
    if uses_triton(x):
        from hpcinfer.kernels import triton_experts

        return triton_experts.expert_outputs(x, ids, weights, experts)
    pairs, counts = _sort_pairs(ids, experts)
    tokens = pairs // ids.shape[1]
    out = _compute(x.index_select(0, tokens), counts, experts)
    out = out.to(weights.dtype) * weights.reshape(-1)[pairs, None]
    total = torch.zeros(x.shape, dtype=weights.dtype, device=x.device)
    return total.index_add_(0, tokens, out).to(x.dtype)


def _sort_pairs(ids: torch.Tensor, experts: ExpertWeights) -> tuple[torch.Tensor, list[int]]:
    """The pairs of this rank's experts, sorted by expert: int64 [M] into ids.flatten(), and how many each has."""
    local, elsewhere = ids.reshape(-1) - experts.first, experts.num_local
    local = torch.where((local >= 0) & (local < elsewhere), local, elsewhere)
    counts = torch.bincount(local, minlength=elsewhere + 1).tolist()
    return torch.argsort(local, stable=True)[: len(local) - counts.pop()], counts


def _compute(x: torch.Tensor, counts: list[int], experts: ExpertWeights) -> torch.Tensor:
    """x [M, D] sorted by expert -> [M, D]. One matmul a projection for each expert with tokens."""
    inner = _grouped(x, counts, 2 * experts.size, experts.gate_up, experts.gate_up_bias)
    return _grouped(gate_up_product(inner, experts.gate), counts, experts.hidden, experts.down, experts.down_bias)


def _grouped(
    x: torch.Tensor, counts: list[int], size: int, matrices: Matrices, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [M, in], the next counts[e] rows with matrix e [size, in] and bias[e] -> [M, size]."""
    out = torch.empty(x.shape[0], size, dtype=x.dtype, device=x.device)
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        matrix = matrices[expert] if isinstance(matrices, torch.Tensor) else unpack(*(t[expert] for t in matrices), x.dtype)
        rows, target = x[start : start + count], out[start : start + count]
        if bias is None:
            torch.mm(rows, matrix.t(), out=target)
        else:
            torch.addmm(bias[expert], rows, matrix.t(), out=target)
        start += count
    return out
