"""MXFP4 weights (OCP Microscaling Formats 1.0): blocks of 32 four-bit numbers (e2m1) with a shared power of two (e8m0).

Shape letters: G blocks of 32 values in a row.
"""

from __future__ import annotations

import torch

BLOCK_VALUES = 32
BLOCK_BYTES = 16
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SCALE_BIAS = 127
_NAN_SCALE = 255


def _byte_values() -> torch.Tensor:
    """float32 [256, 2]: the two numbers of a byte, that of the low four bits first."""
    numbers = torch.tensor([sign * magnitude for sign in (1.0, -1.0) for magnitude in _MAGNITUDES])
    byte = torch.arange(256)
    return torch.stack((numbers[byte & 15], numbers[byte >> 4]), dim=1)


def _scale_values() -> torch.Tensor:
    """float32 [256]: what a scale byte stands for."""
    values = [2.0 ** (byte - _SCALE_BIAS) for byte in range(_NAN_SCALE)] + [float("nan")]
    return torch.tensor(values, dtype=torch.float64).float()


_BYTE_VALUES = _byte_values()
_SCALE_VALUES = _scale_values()


def unpack(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """blocks uint8 [..., G, 16] and scales uint8 [..., G] -> [..., 32 G], made in float32 and rounded to `dtype`."""
    device = blocks.device
    values = _BYTE_VALUES.to(device).index_select(0, blocks.reshape(-1).int())
    values = values.view(*blocks.shape[:-1], BLOCK_VALUES)
    values *= _SCALE_VALUES.to(device)[scales.int()][..., None]
    return values.flatten(-2).to(dtype)
