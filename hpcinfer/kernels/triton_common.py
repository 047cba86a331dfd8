"""What several Triton kernels use."""

from __future__ import annotations

import triton
import triton.language as tl


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Kernels run as Python on the CPU (TRITON_INTERPRET=1)."""


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 x rounded to `dtype`, to the nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter cuts off what bfloat16 has no place for.
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def add_product(acc, a, b):
    """acc + a @ b, summed in float32; float32 operands are not rounded."""
    if INTERPRETED:
        # The interpreter multiplies the bits of bfloat16 as if they were integers.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`; 1 for 0."""
    return 1 << max(size - 1, 0).bit_length()
