"""Products with MXFP4 matrices that are unpacked where they are multiplied. See `mxfp4`."""

from __future__ import annotations

import triton
import triton.language as tl

from hpcinfer.kernels.triton_common import INTERPRETED, add_product, rounded


@triton.jit
def _e2m1(code):
    """float32 of the four-bit numbers in `code`: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""
    magnitude = (code & 7).to(tl.int32)
    # Exponent and mantissa of a normal number are where float32 has them; 0 and 0.5 have the exponent 0.
    bits = tl.where(magnitude < 2, magnitude * 0x3F000000, (magnitude << 22) + (126 << 23))
    return (bits | ((code & 8).to(tl.int32) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def _e8m0(code):
    """float32 of the powers of two in `code`: 2 ** (code - 127), NaN for 255."""
    code = code.to(tl.int32)
    bits = tl.where(code == 0, 0x00400000, tl.where(code == 255, 0x7FC00000, code << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def add_packed_product(acc, blocks, scales, x):
    """acc [rows, tokens] + matrix @ x^T in float32.

    blocks: uint8 [rows, columns / 2], a byte with the numbers of an even column (its low bits) and of the odd one after it;
    scales: uint8 [rows, columns / 32]; x: [tokens, columns].
    """
    rows: tl.constexpr = blocks.shape[0]
    half: tl.constexpr = blocks.shape[1]
    groups: tl.constexpr = half // 16
    if x.dtype == tl.bfloat16 and not INTERPRETED:
        # The compiler's own unpacking has a third of the instructions of the one below. Fast: a scale of NaN gives infinity.
        return tl.dot_scaled(blocks, scales, "e2m1", tl.trans(x), None, "bf16", acc, fast_math=True)
    scale = tl.reshape(tl.broadcast_to(_e8m0(scales)[:, :, None], [rows, groups, 16]), [rows, half])
    # x is the smaller side: it is parted into even and odd columns, not the matrix joined from them.
    even, odd = tl.split(tl.reshape(x, [x.shape[0], half, 2]))
    acc = add_product(acc, rounded(_e2m1(blocks & 15) * scale, x.dtype), tl.trans(even))
    return add_product(acc, rounded(_e2m1(blocks >> 4) * scale, x.dtype), tl.trans(odd))
