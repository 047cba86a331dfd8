"""Gates of gated MLPs (Shazeer 2020): act(gate) * up, from the merged output of both projections.

Shape letters: M rows, I size of gate and of up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from hpcinfer.kernels.select import uses_triton

# Every one maps 0 to 0, so that padded columns contribute nothing.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}

SWIGLU_ALPHA = 1.702
"""Gain of the sigmoid in gpt-oss's gating."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """What becomes of a gate and its up."""

    activation: str
    """A name of ACTIVATIONS; not used where there is a limit."""
    limit: float = 0.0
    """0: act(gate) * up. Above: gpt-oss's (up + 1) * gate * sigmoid(alpha * gate), both clamped to it; 0 where gate is 0."""


def gate_up_product(gate_up: torch.Tensor, gate: Gate) -> torch.Tensor:
    """gate_up [M, 2I], gate's columns before up's -> [M, I], rounded after each operation as torch rounds."""
    if uses_triton(gate_up):
        from hpcinfer.kernels import triton_gate

        return triton_gate.gate_up_product(gate_up, gate)
    left, right = gate_up.split(gate_up.shape[-1] // 2, dim=-1)
    if not gate.limit:
        return ACTIVATIONS[gate.activation](left).mul_(right)
    left, right = left.clamp(max=gate.limit), right.clamp(-gate.limit, gate.limit)
    return (right + 1) * (left * torch.sigmoid(left * SWIGLU_ALPHA))
