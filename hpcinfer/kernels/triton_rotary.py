"""Norm, rotation and the write into the pages as one pass over the merged heads. See `rotary`.

A program takes some heads of one token, each as two halves. Results go back to where the heads were.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hpcinfer.kernels.rotary import HeadNorm, Pages, RotaryTables
from hpcinfer.kernels.triton_common import power_of_two, rounded

_PAIRS = 1024
"""Pairs of numbers that a program turns: 16 bytes of each half for each of its threads."""


def norm_rotate(x: torch.Tensor, norm: HeadNorm, rotary: RotaryTables) -> torch.Tensor:
    """As `rotary.norm_rotate`, in place; norm or rotary is there."""
    _launch(x, x.shape[1], x.shape[1], norm, rotary, None, None)
    return x


def norm_rotate_write(
    qkv: torch.Tensor, num_heads: int, norm: HeadNorm, rotary: RotaryTables, pages: Pages, slots: torch.Tensor
) -> None:
    """As `rotary.norm_rotate_write`: queries and keys are changed in place."""
    _launch(qkv, num_heads, (num_heads + qkv.shape[1]) // 2, norm, rotary, pages, slots)


def _launch(
    x: torch.Tensor,
    num_heads: int,
    num_turned: int,
    norm: HeadNorm,
    rotary: RotaryTables,
    pages: Pages | None,
    slots: torch.Tensor | None,
) -> None:
    num_tokens, total, head_dim = x.shape
    assert x.stride()[1:] == (head_dim, 1) and head_dim % 2 == 0, (x.shape, x.stride())
    strides = (0, 0, 0)
    if pages is not None:
        assert pages[0].shape[2:] == (total - num_turned, head_dim), "pages are [block, token, head, dim]"
        assert pages[0].stride() == pages[1].stride() and pages[0].stride(3) == 1
        strides = pages[0].stride()[:3]
    # Queries that neither a norm nor a rotation changes stay as they are.
    first = 0 if norm or rotary else num_heads
    if not num_tokens:
        return
    block_half = power_of_two(head_dim // 2)
    block_heads = min(max(_PAIRS // block_half, 1), power_of_two(total - first))
    weight, eps = norm or (None, 0.0)
    cos, sin = rotary or (None, None)
    key_pages, value_pages = pages or (None, None)
    _heads_kernel[(num_tokens, triton.cdiv(total - first, block_heads))](
        x, weight, cos, sin, key_pages, value_pages, slots, x.stride(0), *strides, eps,
        FIRST=first, NUM_HEADS=num_heads, NUM_TURNED=num_turned, TOTAL=total, HALF=head_dim // 2,
        PAGE=pages[0].shape[1] if pages else 1, BLOCK_HEADS=block_heads, BLOCK_HALF=block_half,
        NORMS=norm is not None, ROTATES=rotary is not None, WRITES=pages is not None,
        # Products are rounded before they are added, in float32 too.
        num_warps=min(max(block_heads * block_half // 256, 1), 4), enable_fp_fusion=False,
    )


@triton.jit
def _heads_kernel(
    x, weight, cos, sin, key_pages, value_pages, slots,
    token_stride, page_stride, page_token_stride, page_head_stride, eps,
    FIRST: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_TURNED: tl.constexpr, TOTAL: tl.constexpr, HALF: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
    NORMS: tl.constexpr, ROTATES: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = FIRST + tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    column = tl.arange(0, BLOCK_HALF)[None, :]
    inside = (head < TOTAL) & (column < HALF)
    turned = head < NUM_TURNED
    dtype = x.dtype.element_ty
    place = x + token * token_stride + head * (2 * HALF) + column
    first = tl.load(place, mask=inside, other=0.0)
    second = tl.load(place + HALF, mask=inside, other=0.0)
    if NORMS:
        one, two = first.to(tl.float32), second.to(tl.float32)
        mean = tl.sum(one * one + two * two, axis=1, keep_dims=True) / (2 * HALF)
        scale = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
        factor = weight + head * (2 * HALF) + column
        one_factor = tl.load(factor, mask=inside & turned, other=0.0).to(tl.float32)
        two_factor = tl.load(factor + HALF, mask=inside & turned, other=0.0).to(tl.float32)
        one = rounded(rounded(one * scale, dtype).to(tl.float32) * one_factor, dtype)
        two = rounded(rounded(two * scale, dtype).to(tl.float32) * two_factor, dtype)
        first, second = tl.where(turned, one, first), tl.where(turned, two, second)
    if ROTATES:
        angle = token * HALF + column
        c = tl.load(cos + angle, mask=column < HALF, other=0.0).to(tl.float32)
        s = tl.load(sin + angle, mask=column < HALF, other=0.0).to(tl.float32)
        one, two = first.to(tl.float32), second.to(tl.float32)
        left = rounded(one * c, dtype).to(tl.float32) - rounded(two * s, dtype).to(tl.float32)
        right = rounded(two * c, dtype).to(tl.float32) + rounded(one * s, dtype).to(tl.float32)
        first = tl.where(turned, rounded(left, dtype), first)
        second = tl.where(turned, rounded(right, dtype), second)
    if NORMS or ROTATES:
        tl.store(place, first, mask=inside & turned)
        tl.store(place + HALF, second, mask=inside & turned)
    if WRITES:
        slot = tl.load(slots + token)
        row = slot // PAGE * page_stride + slot % PAGE * page_token_stride + column
        is_key = inside & turned & (head >= NUM_HEADS)
        key = key_pages + row + (head - NUM_HEADS) * page_head_stride
        tl.store(key, first, mask=is_key)
        tl.store(key + HALF, second, mask=is_key)
        is_value = inside & (head >= NUM_TURNED)
        value = value_pages + row + (head - NUM_TURNED) * page_head_stride
        tl.store(value, first, mask=is_value)
        tl.store(value + HALF, second, mask=is_value)
