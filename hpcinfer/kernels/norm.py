"""RMSNorm (Zhang and Sennrich 2019), alone and behind the addition of a residual stream.

Shape letters: T rows, D size of a row.
"""

from __future__ import annotations

import torch

from hpcinfer.kernels.select import uses_triton


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, wide: bool = False) -> torch.Tensor:
    """x / rms(x) * weight over the last dim.

    Statistics are float32, and the result is rounded to x's dtype before the weight multiplies it, as transformers
    does: another order gives other bfloat16 numbers.

    Args:
        x: [..., D].
        weight: [D], of x's dtype.
        eps: added to the mean square.
        wide: the weight multiplies before the rounding to x's dtype, as gpt-oss has it.

    Returns:
        The same shape and dtype; a new tensor.
    """
    if uses_triton(x):
        from hpcinfer.kernels import triton_norm

        return triton_norm.rms_norm(x, weight, eps, wide=wide)
    full = x.float()
    scale = full.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    if wide:
        return (full * scale).mul_(weight).to(x.dtype)
    return (full * scale).to(x.dtype).mul_(weight)


def add_rms_norm(
    hidden: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float, *, wide: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of hidden + y, and that sum: what follows the reduction of a layer's output.

    Args:
        hidden, y: [T, D]; neither is changed.
        weight, eps, wide: as of `rms_norm`.

    Returns:
        The norm and the sum (rounded to the dtype before it is normalised), [T, D] each; new tensors.
    """
    if uses_triton(hidden):
        from hpcinfer.kernels import triton_norm

        return triton_norm.add_rms_norm(hidden, y, weight, eps, wide=wide)
    total = hidden + y
    return rms_norm(total, weight, eps, wide=wide), total
