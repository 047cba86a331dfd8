"""Which pairs of a token and an expert a rank computes, on the device alone: sorted by expert before, summed by token after.

Shape letters: as in `experts`; pair token * k + i is a token and the i-th of its experts.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from hpcinfer.kernels.experts import ExpertWeights
from hpcinfer.kernels.triton_common import power_of_two, rounded

_CHUNK = 1024
_COLUMNS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SortedPairs:
    """Pairs by expert, cut into tiles of one expert each.

    How many tiles there may be follows from T, k and L, which the host knows; those that the tokens do not fill have nobody.
    """

    order: torch.Tensor
    """int32 [T k]: pairs, sorted by expert; what follows those of this rank is not set."""
    tiles: torch.Tensor
    """int32 [3, tiles]: local expert (-1: nobody), first and one past the last place in `order` of its pairs."""


def sort_pairs(ids: torch.Tensor, experts: ExpertWeights, tile_tokens: int) -> SortedPairs:
    """ids int64 [T, k], of which some are this rank's; at most `tile_tokens` pairs in a tile."""
    assert ids.is_contiguous()
    num_pairs = ids.numel()
    num_tiles = num_pairs // tile_tokens + experts.num_local
    order = torch.empty(num_pairs, dtype=torch.int32, device=ids.device)
    tiles = torch.empty(3, num_tiles, dtype=torch.int32, device=ids.device)
    _sort_kernel[(experts.num_local,)](
        ids, order, tiles, num_pairs, num_tiles, experts.first,
        NUM_LOCAL=experts.num_local, TILE=tile_tokens, CHUNK=_CHUNK, num_warps=4, enable_fp_fusion=False,
    )
    return SortedPairs(order=order, tiles=tiles)


def weighted_sums(
    outputs: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: ExpertWeights
) -> torch.Tensor:
    """outputs [T k, D] by pair, of which those of other ranks are not set; ids, weights [T, k] -> [T, D], rounded once."""
    assert weights.is_contiguous()
    num_tokens, hidden = ids.shape[0], outputs.shape[1]
    total = torch.empty(num_tokens, hidden, dtype=outputs.dtype, device=outputs.device)
    block = min(power_of_two(hidden), _COLUMNS)
    _combine_kernel[(num_tokens, triton.cdiv(hidden, block))](
        outputs, ids, weights, total, hidden, experts.first, experts.first + experts.num_local,
        NUM_CHOSEN=ids.shape[1], BLOCK=block, num_warps=min(max(block // 256, 1), 4), enable_fp_fusion=False,
    )
    return total


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def _sort_kernel(
    ids, order, tiles, num_pairs, num_tiles, first,
    NUM_LOCAL: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A program an expert. It counts its own pairs and those of experts before it; no two programs meet."""
    mine = first + tl.program_id(0)
    before, count = 0, 0
    for start in range(0, num_pairs, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        expert = tl.load(ids + pair, mask=pair < num_pairs, other=-1)
        before += tl.sum(((expert >= first) & (expert < mine)).to(tl.int32), axis=0)
        count += tl.sum((expert == mine).to(tl.int32), axis=0)
    # ceil(count / TILE) <= (before + count) // TILE - before // TILE + 1: the experts' places for tiles never meet.
    tile = before // TILE + tl.program_id(0)
    end = (before + count) // TILE + tl.program_id(0) + 1
    if tl.program_id(0) == NUM_LOCAL - 1:
        end = num_tiles
    for start in range(tile, end, CHUNK):
        index = start + tl.arange(0, CHUNK)
        begin = before + (index - tile) * TILE
        is_filled = begin < before + count
        tl.store(tiles + index, tl.where(is_filled, tl.program_id(0), -1), mask=index < end)
        tl.store(tiles + num_tiles + index, begin, mask=index < end)
        tl.store(tiles + 2 * num_tiles + index, tl.minimum(begin + TILE, before + count), mask=index < end)
    for start in range(0, num_pairs, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        is_mine = tl.load(ids + pair, mask=pair < num_pairs, other=-1) == mine
        place = before + tl.cumsum(is_mine.to(tl.int32), axis=0) - 1
        tl.store(order + place, pair, mask=is_mine)
        before += tl.sum(is_mine.to(tl.int32), axis=0)


@triton.jit
def _combine_kernel(
    outputs, ids, weights, total, hidden, first, end, NUM_CHOSEN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(NUM_CHOSEN):
        pair = token * NUM_CHOSEN + i
        expert = tl.load(ids + pair)
        size = tl.where((expert >= first) & (expert < end), hidden, 0)
        output = tl.load(outputs + pair * hidden + column, mask=column < size, other=0.0)
        acc += tl.where(column < size, output.to(tl.float32) * tl.load(weights + pair), 0.0)
    tl.store(total + token * hidden + column, rounded(acc, total.dtype.element_ty), mask=column < hidden)
