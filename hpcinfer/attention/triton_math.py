"""What both attention kernels compute alike. Imported only where Triton is used."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
"""Scores are multiplied by it, so that exponentials are of base 2, which GPUs compute directly."""

LISTS = ("block_tables", "seq_lens", "query_start_loc", "entries", "programs")
"""Arguments of which single numbers are read. Where they begin changes nothing, and must not make Triton compile once more in mid-run."""


def has_shared_memory(capability: tuple[int, int], kib: int) -> bool:
    """A multiprocessor of this compute capability can give one program so much (CUDA C++ Programming Guide, compute
    capabilities): 227 KiB on 9.0 and 10.x, 163 on 8.0, 99 on the others from 8.6 on."""
    most = 227 if (9, 0) <= capability < (12, 0) else 163 if capability in ((8, 0), (8, 7)) else 99
    return kib <= most


@triton.jit
def page_offsets(table, at, positions, wanted, PAGE: tl.constexpr, TILE: tl.constexpr):
    """Slots, int64 [TILE], of the consecutive `positions` that begin at `at`, a multiple of TILE.

    Where a tile lies inside one page its number is read once; otherwise it is read for each token, from the cache.
    """
    if PAGE % TILE == 0:
        page = tl.load(table + at // PAGE).to(tl.int64)
        slots = page * PAGE + at % PAGE + tl.arange(0, TILE)
    else:
        pages = tl.load(table + positions // PAGE, mask=wanted, other=0).to(tl.int64)
        slots = pages * PAGE + positions % PAGE
    return slots


@triton.jit
def capped(scores, scale_log2, SOFTCAP: tl.constexpr):
    """Products of queries and keys -> scores in units of log2: scaled, and under a softcap c: c tanh(score / c)."""
    if SOFTCAP > 0:
        scores = SOFTCAP * 1.4426950408889634 * _tanh(scores * (scale_log2 / (SOFTCAP * 1.4426950408889634)))
    else:
        scores = scores * scale_log2
    return scores


@triton.jit
def _tanh(x):
    """By exp2; near 0, where that cancels, by the series up to x**9 (error under 2e-9 for |x| < 0.25)."""
    square = x * x
    near = x * (1 + square * (-0.33333333 + square * (0.13333333 + square * (-0.05396825 + square * 0.02186949))))
    far = 1 - 2 / (tl.exp2(x * 2.8853900817779268) + 1)
    return tl.where(square < 0.0625, near, far)
