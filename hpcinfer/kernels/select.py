"""Whether an operation runs as a Triton kernel: decided by the tensor that it gets, as torch's own operators decide."""

from __future__ import annotations

import importlib.util

import torch

_TRITON_IS_THERE = importlib.util.find_spec("triton") is not None


def uses_triton(x: torch.Tensor) -> bool:
    """True where `x` is on a GPU, is no float64 tensor (which is for checking), and triton is installed."""
    return x.is_cuda and x.dtype != torch.float64 and _TRITON_IS_THERE
