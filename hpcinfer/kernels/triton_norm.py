"""RMSNorm as one pass over memory: a program keeps a whole row in registers. See `norm`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hpcinfer.kernels.triton_common import power_of_two, rounded


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, wide: bool = False) -> torch.Tensor:
    """As `norm.rms_norm`."""
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    normed = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    _launch(rows, None, weight, normed, None, eps, wide)
    return normed.view(x.shape)


def add_rms_norm(
    hidden: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float, *, wide: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `norm.add_rms_norm`."""
    normed, total = (torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) for _ in range(2))
    _launch(hidden, y, weight, normed, total, eps, wide)
    return normed, total


def _launch(
    x: torch.Tensor,
    y: torch.Tensor | None,
    weight: torch.Tensor,
    normed: torch.Tensor,
    total: torch.Tensor | None,
    eps: float,
    wide: bool,
) -> None:
    num_rows, size = x.shape
    assert x.stride(1) == 1 and (y is None or y.stride(1) == 1)
    if not num_rows:
        return
    block = power_of_two(size)
    _rms_norm_kernel[(num_rows,)](
        x, y, weight, normed, total, x.stride(0), 0 if y is None else y.stride(0), eps,
        SIZE=size, BLOCK=block, ADDS=y is not None, WIDE=wide,
        # Two 16-byte accesses a thread in half precision, four in float32.
        num_warps=min(max(block // 512, 1), 16), enable_fp_fusion=False,
    )


@triton.jit
def _rms_norm_kernel(
    x, y, weight, normed, total, x_stride, y_stride, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    dtype = normed.dtype.element_ty
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        added = tl.load(y + row * y_stride + column, mask=inside, other=0.0).to(tl.float32)
        kept = rounded(value + added, dtype)
        tl.store(total + row * SIZE + column, kept, mask=inside)
        value = kept.to(tl.float32)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(value * value, axis=0) / SIZE + eps))
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    value = value * scale
    if not WIDE:
        value = rounded(value, dtype).to(tl.float32)
    tl.store(normed + row * SIZE + column, rounded(value * factor, dtype), mask=inside)
