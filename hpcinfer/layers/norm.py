"""Normalisation: RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba et al. 2016).

Replicated on all ranks of the tensor-parallel axis. Shape letters: T tokens, N query heads and K key heads of this rank,
H head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from hpcinfer.kernels.norm import add_rms_norm, rms_norm
from hpcinfer.kernels.rotary import HeadNorm
from hpcinfer.layers.shard import check_shape


class RmsNorm:
    """x / rms(x) * weight over the last dim.

    Args:
        size: of the last dim.
        eps: added to the mean square.
        dtype, device: of the weight.
    """

    wide = False
    """The weight multiplies before the rounding to x's dtype."""

    def __init__(self, size: int, *, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        self.eps = eps
        self.weight = torch.ones(size, dtype=dtype, device=device)

    def load_weight(self, full: torch.Tensor) -> None:
        """Take the weight [size]."""
        check_shape(full, tuple(self.weight.shape), "norm weight")
        self.weight.copy_(full)

    def weights(self) -> dict[str, Callable[[torch.Tensor], None]]:
        """What takes each tensor of the checkpoint."""
        return {"weight": self.load_weight}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., size] -> the same shape and dtype."""
        return rms_norm(x, self.weight, self.eps, wide=self.wide)

    def forward_sum(self, hidden: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden and y [T, size] -> the norm of their sum, and their sum; new tensors."""
        return add_rms_norm(hidden, y, self.weight, self.eps, wide=self.wide)


class WideRmsNorm(RmsNorm):
    """RMSNorm as gpt-oss has it."""

    wide = True


class LayerNorm:
    """(x - mean(x)) / std(x) * weight + bias over the last dim, with torch's numbers.

    Args:
        size: of the last dim.
        eps: added to the variance.
        dtype, device: of weight and bias.
    """

    def __init__(self, size: int, *, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        self.eps = eps
        self.weight = torch.ones(size, dtype=dtype, device=device)
        self.bias = torch.zeros(size, dtype=dtype, device=device)

    def load_weight(self, full: torch.Tensor) -> None:
        """Take the weight [size]."""
        check_shape(full, tuple(self.weight.shape), "norm weight")
        self.weight.copy_(full)

    def load_bias(self, full: torch.Tensor) -> None:
        """Take the bias [size]."""
        check_shape(full, tuple(self.bias.shape), "norm bias")
        self.bias.copy_(full)

    def weights(self) -> dict[str, Callable[[torch.Tensor], None]]:
        """What takes each tensor of the checkpoint."""
        return {"weight": self.load_weight, "bias": self.load_bias}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., size] -> the same shape and dtype. Statistics are float32."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def forward_sum(self, hidden: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden and y [T, size] -> the norm of their sum, and their sum; new tensors."""
        total = hidden + y
        return self.forward(total), total


class QkNorm:
    """RMSNorm of each query and each key head, with one weight for queries and one for keys (Qwen3), as one operation.

    Args:
        num_heads, num_kv_heads: N and K of this rank.
        head_dim: H.
    """

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, *, eps: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.eps = eps
        self._num_heads = num_heads
        self.weight = torch.ones(num_heads + num_kv_heads, head_dim, dtype=dtype, device=device)

    def load_q(self, full: torch.Tensor) -> None:
        """Take the queries' weight [H]."""
        check_shape(full, tuple(self.weight.shape[1:]), "q_norm weight")
        self.weight[: self._num_heads].copy_(full)

    def load_k(self, full: torch.Tensor) -> None:
        """Take the keys' weight [H]."""
        check_shape(full, tuple(self.weight.shape[1:]), "k_norm weight")
        self.weight[self._num_heads :].copy_(full)

    @property
    def of_qk(self) -> HeadNorm:
        """The norm of [T, N + K, H], query heads first, for `kernels.rotary`."""
        return self.weight, self.eps

    @property
    def of_q(self) -> HeadNorm:
        """The norm of query heads [T, N, H]."""
        return self.weight[: self._num_heads], self.eps

    @property
    def of_k(self) -> HeadNorm:
        """The norm of key heads [T, K, H]."""
        return self.weight[self._num_heads :], self.eps
