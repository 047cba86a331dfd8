"""Gates as one pass over memory. See `gate`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hpcinfer.kernels.gate import SWIGLU_ALPHA, Gate
from hpcinfer.kernels.triton_common import power_of_two, rounded

_COLUMNS = 1024
_ALPHA = tl.constexpr(SWIGLU_ALPHA)


def gate_up_product(gate_up: torch.Tensor, gate: Gate) -> torch.Tensor:
    """As `gate.gate_up_product`."""
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1
    out = torch.empty(num_rows, size, dtype=gate_up.dtype, device=gate_up.device)
    if not out.numel():
        return out
    block = min(power_of_two(size), _COLUMNS)
    _gate_kernel[(num_rows, triton.cdiv(size, block))](
        gate_up, out, gate_up.stride(0), size,
        ACTIVATION=gate.activation, LIMIT=gate.limit, BLOCK=block,
        num_warps=min(max(block // 256, 1), 4), enable_fp_fusion=False,
    )
    return out


@triton.jit
def gated(left, right, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, dtype: tl.constexpr):
    """act(left) * right of float32 numbers that are numbers of `dtype`, rounded to it after each operation as torch does."""
    # Comparisons, not minima and maxima: NaN must stay NaN.
    if LIMIT > 0:
        left = tl.where(left > LIMIT, LIMIT, left)
        right = tl.where(right > LIMIT, LIMIT, tl.where(right < -LIMIT, -LIMIT, right))
        gain = rounded(tl.sigmoid(rounded(left * _ALPHA, dtype).to(tl.float32)), dtype).to(tl.float32)
        left = rounded(left * gain, dtype).to(tl.float32)
        right = rounded(right + 1.0, dtype).to(tl.float32)
    else:
        if ACTIVATION == "silu":
            left = left / (1.0 + tl.exp(-left))
        elif ACTIVATION == "gelu":
            left = 0.5 * left * (1.0 + tl.erf(left * 0.7071067811865476))
        elif ACTIVATION == "gelu_tanh":
            # 0.5 * (1 + tanh(z)) = sigmoid(2 z), which loses nothing where tanh is near -1.
            left = left * tl.sigmoid(1.5957691216057308 * (left + 0.044715 * left * left * left))
        else:
            tl.static_assert(ACTIVATION == "relu")
            left = tl.where(left < 0, 0.0, left)
        left = rounded(left, dtype).to(tl.float32)
    return rounded(left * right, dtype)


@triton.jit
def _gate_kernel(
    gate_up, out, row_stride, size, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    place = gate_up + row * row_stride + column
    left = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(place + size, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, gated(left, right, ACTIVATION, LIMIT, out.dtype.element_ty), mask=inside)
