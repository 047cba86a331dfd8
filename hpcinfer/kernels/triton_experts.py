"""Grouped matrix products of experts, with nothing that the host must know about who is sent where. See `experts`.

Four kernels: pairs are sorted by expert and cut into tiles (`triton_pairs`); gate and up projection with their gate; down
projection; the weighted sum over each token's experts (`triton_pairs`).

Tokens are few and weights many, so weights are the left, tall side of the products: 16 tokens make a narrow right side.

Shape letters: as in `experts`.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from hpcinfer.kernels.experts import ExpertWeights, Matrices
from hpcinfer.kernels.gate import Gate
from hpcinfer.kernels.triton_common import add_product, power_of_two, rounded
from hpcinfer.kernels.triton_gate import gated
from hpcinfer.kernels.triton_mxfp4 import add_packed_product
from hpcinfer.kernels.triton_pairs import SortedPairs, sort_pairs, weighted_sums

_PLAIN = Gate(activation="")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Tile:
    """How a product is cut."""

    tokens: int
    """Right side: pairs of one expert."""
    rows: int
    """Left side: rows of an expert's matrix; half of them gate's and half up's where it has both."""
    columns: int
    """Summed in one go."""
    num_warps: int
    num_stages: int


def expert_outputs(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: ExpertWeights
) -> torch.Tensor:
    """As `experts.expert_outputs`."""
    num_pairs, num_chosen = ids.numel(), ids.shape[1]
    if not num_pairs or not experts.num_local:
        return torch.zeros_like(x)
    tile = _choose_tile(num_pairs / experts.num_experts, x.dtype)
    pairs = sort_pairs(ids, experts, tile.tokens)
    inner = torch.empty(num_pairs, experts.size, dtype=x.dtype, device=x.device)
    _product(x, experts.gate_up, experts.gate_up_bias, inner, pairs, tile, gate=experts.gate, num_chosen=num_chosen)
    outputs = torch.empty(num_pairs, experts.hidden, dtype=x.dtype, device=x.device)
    _product(inner, experts.down, experts.down_bias, outputs, pairs, tile)
    return weighted_sums(outputs, ids, weights, experts)


def _choose_tile(pairs_per_expert: float, dtype: torch.dtype) -> _Tile:
    """A fixed table: every rank cuts alike, and a step alike in every run. Sized for 99 KiB of shared memory."""
    tokens = min(max(power_of_two(int(pairs_per_expert)), 16), 128)
    if dtype == torch.float32:
        # No tensor core multiplies float32 exactly enough; small tiles, as all of it is in registers.
        return _Tile(tokens=min(tokens, 32), rows=64, columns=32, num_warps=4, num_stages=2)
    return _Tile(
        tokens=tokens, rows=128, columns=64,
        num_warps=8 if tokens == 128 else 4, num_stages=4 if tokens < 64 else 3,
    )


def _product(
    x: torch.Tensor,
    matrices: Matrices,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    pairs: SortedPairs,
    tile: _Tile,
    *,
    gate: Gate | None = None,
    num_chosen: int = 1,
) -> None:
    """Each pair's row of x with its expert's matrix.

    With a gate: rows of x are tokens, rows of `out` are in the order of `pairs`. Without one: rows of x are in that order,
    rows of `out` are pairs.
    """
    rows, columns = out.shape[1], x.shape[1]
    is_packed = not isinstance(matrices, torch.Tensor)
    blocks, scales = matrices if is_packed else (matrices, None)
    assert blocks.is_contiguous() and (scales is None or scales.is_contiguous()) and x.stride(1) == 1
    num_tiles = pairs.tiles.shape[1]
    gate_of = gate or _PLAIN
    _product_kernel[(triton.cdiv(rows, tile.rows if gate is None else tile.rows // 2), num_tiles)](
        x, blocks, scales, bias, out, pairs.order, pairs.tiles, num_tiles, rows, columns, x.stride(0), blocks.stride(0),
        scales.stride(0) if is_packed else 0,
        NUM_CHOSEN=num_chosen, GATED=gate is not None, ACTIVATION=gate_of.activation, LIMIT=gate_of.limit,
        PACKED=is_packed, EVEN=not is_packed and columns % tile.columns == 0,
        TOKENS=tile.tokens, ROWS=tile.rows, COLUMNS=tile.columns,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=False,
    )


@triton.jit
def _load(place, inside, MASKED: tl.constexpr):
    """What is at `place`, 0 where masked and not inside."""
    if MASKED:
        return tl.load(place, mask=inside, other=0)
    return tl.load(place)


@triton.jit
def _plain_sums(acc, x, matrix, row, source, columns, EVEN: tl.constexpr, COLUMNS: tl.constexpr):
    """acc [ROWS, TOKENS] + rows `row` of the matrix times what begins at `source` in x."""
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        values = _load(x + source[:, None] + column, column < columns, not EVEN)
        weights = _load(matrix + row[:, None] * columns + column, column < columns, not EVEN)
        acc = add_product(acc, weights, tl.trans(values))
    return acc


@triton.jit
def _packed_sums(acc, x, blocks, scales, row, source, columns, COLUMNS: tl.constexpr):
    """The same for an MXFP4 matrix."""
    column, byte = tl.arange(0, COLUMNS)[None, :], tl.arange(0, COLUMNS // 2)[None, :]
    group = tl.arange(0, COLUMNS // 32)[None, :]
    x_at = x + source[:, None] + column
    blocks_at = blocks + row[:, None] * (columns // 2) + byte
    scales_at = scales + row[:, None] * (columns // 32) + group
    # The compiler fetches ahead what is copied to shared memory as it is: the blocks. The others are fetched ahead here.
    values = tl.load(x_at, mask=column < columns, other=0.0)
    scale = tl.load(scales_at, mask=group < columns // 32, other=0)
    for start in range(0, columns, COLUMNS):
        ahead = start + COLUMNS
        next_values = tl.load(x_at + ahead, mask=column < columns - ahead, other=0.0)
        next_scale = tl.load(scales_at + ahead // 32, mask=group < (columns - ahead) // 32, other=0)
        code = tl.load(blocks_at + start // 2, mask=byte < (columns - start) // 2, other=0)
        acc = add_packed_product(acc, code, scale, values)
        values, scale = next_values, next_scale
    return acc


@triton.jit(do_not_specialize=["num_tiles"])
def _product_kernel(
    x, matrices, scales, bias, out, order, tiles, num_tiles, rows, columns, x_stride, matrix_stride, scale_stride,
    NUM_CHOSEN: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr,
    PACKED: tl.constexpr, EVEN: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    expert = tl.load(tiles + tl.program_id(1)).to(tl.int64)
    if expert < 0:
        return
    begin, end = tl.load(tiles + num_tiles + tl.program_id(1)), tl.load(tiles + 2 * num_tiles + tl.program_id(1))
    dtype = out.dtype.element_ty
    # What is beyond the pairs or the matrix is computed from the last pair or row, and not kept.
    place = begin + tl.arange(0, TOKENS)
    pair = tl.load(order + tl.minimum(place, end - 1))
    if GATED:
        # Rows of gate, and the same rows of up, which stand `rows` further on.
        kept: tl.constexpr = ROWS // 2
        index = tl.arange(0, ROWS)
        row = tl.minimum(tl.program_id(0) * kept + index % kept, rows - 1) + index // kept * rows
        matrix_rows = 2 * rows
        source, target = pair // NUM_CHOSEN, place
    else:
        kept: tl.constexpr = ROWS
        row = tl.minimum(tl.program_id(0) * kept + tl.arange(0, ROWS), rows - 1)
        matrix_rows = rows
        source, target = tl.minimum(place, end - 1), pair
    source = source.to(tl.int64) * x_stride
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    matrix = matrices + expert * matrix_stride
    if PACKED:
        acc = _packed_sums(acc, x, matrix, scales + expert * scale_stride, row, source, columns, COLUMNS)
    else:
        acc = _plain_sums(acc, x, matrix, row, source, columns, EVEN, COLUMNS)
    if bias is not None:
        acc += tl.load(bias + expert * matrix_rows + row).to(tl.float32)[:, None]
    result = rounded(acc, dtype)
    if GATED:
        left, right = tl.split(tl.permute(tl.reshape(result, [2, kept, TOKENS]), [1, 2, 0]))
        result = gated(left.to(tl.float32), right.to(tl.float32), ACTIVATION, LIMIT, dtype)
    column = tl.program_id(0) * kept + tl.arange(0, kept)
    keep = (place < end)[:, None] & (column < rows)[None, :]
    tl.store(out + target.to(tl.int64)[:, None] * rows + column[None, :], tl.trans(result), mask=keep)
