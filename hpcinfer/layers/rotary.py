"""Rotary position embedding (Su et al. 2021) and its stretched forms, with the numbers of transformers.

Shape letters: T tokens, H head dim.
"""

from __future__ import annotations

import math

import torch

from hpcinfer.config.model import RopeConfig


class Rotary:
    """Turns pairs (i, i + H/2) of a head by an angle that grows with the position (the convention of transformers).

    Args:
        rope: base and scaling.
        head_dim: H.
        dtype: cos and sin are computed in float32 and rounded to it.
        device: of the tables.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, *, dtype: torch.dtype, device: torch.device) -> None:
        # Computed on the CPU, so that every device turns by the same angles.
        self._inv_freq = inverse_frequencies(rope, head_dim).to(device)
        self._factor = rope.attention_factor
        self._dtype = dtype

    def tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, 1, H/2] of int64 positions [T]; the same for all layers of a step."""
        angles = positions[:, None, None].float() * self._inv_freq
        cos, sin = angles.cos(), angles.sin()
        if self._factor != 1.0:
            cos.mul_(self._factor)
            sin.mul_(self._factor)
        return cos.to(self._dtype), sin.to(self._dtype)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """float32 [H/2]: radians a position turns each pair."""
    inv_freq = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.type == "linear":
        return inv_freq / rope.factor
    if rope.type == "llama3":
        return _llama3(inv_freq, rope)
    if rope.type == "yarn":
        return _yarn(rope, head_dim)
    return inv_freq


def _llama3(inv_freq: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Llama 3.1: long wavelengths divided by the factor, short ones kept, a linear blend between."""
    wavelength = 2 * math.pi / inv_freq
    longest = rope.original_max_position_embeddings / rope.low_freq_factor
    shortest = rope.original_max_position_embeddings / rope.high_freq_factor
    blend = (rope.original_max_position_embeddings / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - blend) * inv_freq / rope.factor + blend * inv_freq
    scaled = torch.where(wavelength > longest, inv_freq / rope.factor, inv_freq)
    between = (wavelength <= longest) & (wavelength >= shortest)
    return torch.where(between, blended, scaled)


def _yarn(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """YaRN (Peng et al. 2023), section 3.2: interpolate the dims that turn seldom, keep those that turn often."""

    def dim_of(rotations: float) -> float:
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    wavelengths = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    kept = 1 - ramp
    return 1.0 / (rope.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
