"""Heads on their way from the merged projection to attention: norm, rotation, and keys and values into the pages.

Shape letters: T tokens, N query heads and K key/value heads of this rank, H head dim, B blocks, S block size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hpcinfer.kernels.norm import rms_norm
from hpcinfer.kernels.select import uses_triton

RotaryTables = tuple[torch.Tensor, torch.Tensor] | None
"""cos and sin [T, 1, H/2]; None in a family with learned positions."""

HeadNorm = tuple[torch.Tensor, float] | None
"""Weight [heads, H] and eps of a norm of each head; None in a family without."""

Pages = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, [B, S, K, H], any strides with a contiguous last dim."""

WritePages = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""(k [T, K, H], v, key pages, value pages, slots int64 [T]): puts them there."""


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the heads of x [T, heads, H] by cos and sin [T, 1, H/2]: a new tensor, rounded where transformers rounds."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(first, cos, out=out[..., :half]).sub_(second * sin)
    torch.mul(second, cos, out=out[..., half:]).add_(first * sin)
    return out


def norm_rotate(x: torch.Tensor, norm: HeadNorm, rotary: RotaryTables) -> torch.Tensor:
    """Normalise each head of x [T, heads, H], then turn it -> [T, heads, H]. May use x's memory for the result."""
    if uses_triton(x) and (norm or rotary):
        from hpcinfer.kernels import triton_rotary

        return triton_rotary.norm_rotate(x, norm, rotary)
    if norm is not None:
        x = rms_norm(x, *norm)
    return x if rotary is None else rotate(x, *rotary)


def norm_rotate_write(
    qkv: torch.Tensor,
    num_heads: int,
    norm: HeadNorm,
    rotary: RotaryTables,
    pages: Pages,
    slots: torch.Tensor,
    write: WritePages,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`norm_rotate` of queries and keys, and keys and values into the pages.

    Args:
        qkv: [T, N + 2K, H]: query heads, key heads, value heads. Its memory may be used for the result.
        num_heads: N.
        norm: of the N + K first heads.
        slots: int64 [T]: block * S + offset of each token. Tokens of padding may share one that nobody reads.
        write: puts k and v into the pages where no kernel does.

    Returns:
        q [T, N, H], k and v [T, K, H], views with a contiguous last dim.
    """
    num_turned = (num_heads + qkv.shape[1]) // 2
    if uses_triton(qkv):
        from hpcinfer.kernels import triton_rotary

        triton_rotary.norm_rotate_write(qkv, num_heads, norm, rotary, pages, slots)
        qk = qkv[:, :num_turned]
    else:
        qk = norm_rotate(qkv[:, :num_turned], norm, rotary)
        write(qk[:, num_heads:], qkv[:, num_turned:], *pages, slots)
    return qk[:, :num_heads], qk[:, num_heads:], qkv[:, num_turned:]
