"""The keyed draw over rows cut into chunks, which many programs share. See `draw`.

Three kernels: the best logit of each chunk; the sum of a chunk's probabilities, relative to the row's best; then for each
row the chunk in which the draw falls, and the token in it. A row's cuts depend on the vocabulary alone, so its token does
not depend on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hpcinfer.kernels.triton_common import power_of_two
from hpcinfer.request import NOT_A_TOKEN

_CHUNK = 4096
_NOT_A_TOKEN = tl.constexpr(NOT_A_TOKEN)


def draw(
    logits: torch.Tensor, temperature: torch.Tensor, uniforms: torch.Tensor, *, chunk: int = _CHUNK
) -> torch.Tensor:
    """As `draw.draw`. `chunk`: logits that a program takes, a power of two."""
    num_rows, vocabulary = logits.shape
    assert logits.stride(1) == 1 and logits.dtype == torch.float32
    assert temperature.dtype == uniforms.dtype == torch.float64
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if not num_rows:
        return tokens
    num_chunks = triton.cdiv(vocabulary, chunk)
    best = torch.empty(num_rows, num_chunks, dtype=torch.float32, device=logits.device)
    best_token = torch.empty(num_rows, num_chunks, dtype=torch.int32, device=logits.device)
    sums = torch.empty(num_rows, num_chunks, dtype=torch.float64, device=logits.device)
    sizes = {"CHUNK": chunk, "NUM_CHUNKS": num_chunks, "BLOCK_CHUNKS": power_of_two(num_chunks)}
    grid = (num_rows, num_chunks)
    options = {"num_warps": min(max(chunk // 512, 1), 8), "enable_fp_fusion": False}
    _best_kernel[grid](
        logits, best, best_token, logits.stride(0), vocabulary, CHUNK=chunk, NUM_CHUNKS=num_chunks, **options
    )
    _sum_kernel[grid](
        logits, temperature, best, sums, logits.stride(0), vocabulary, **sizes, **options
    )
    _pick_kernel[(num_rows,)](
        logits, temperature, uniforms, best, best_token, sums, tokens, logits.stride(0), vocabulary,
        **sizes, **options,
    )
    return tokens


@triton.jit
def _best_kernel(
    logits, best, best_token, row_stride, vocabulary, CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(logits + row * row_stride + token, mask=token < vocabulary, other=float("-inf"))
    # A maximum does not show NaN; infinity is as little a number of the row's as NaN.
    value = tl.where(value != value, float("inf"), value)
    largest, index = tl.max(value, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best + row * NUM_CHUNKS + chunk, largest)
    tl.store(best_token + row * NUM_CHUNKS + chunk, chunk * CHUNK + index)


@triton.jit
def _load_chunks(values, row, NUM_CHUNKS: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, other):
    """What the row's chunks have; `other` beyond them."""
    chunk = tl.arange(0, BLOCK_CHUNKS)
    return tl.load(values + row * NUM_CHUNKS + chunk, mask=chunk < NUM_CHUNKS, other=other)


@triton.jit
def _weights(logits, token, vocabulary, largest, heat):
    """float64: exp((logit - the row's largest) / temperature) of each token, 0 beyond the vocabulary."""
    value = tl.load(logits + token, mask=token < vocabulary, other=float("-inf")).to(tl.float64)
    return tl.exp((value - largest) / heat)


@triton.jit
def _sum_kernel(
    logits, temperature, best, sums, row_stride, vocabulary,
    CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr, BLOCK_CHUNKS: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heat = tl.load(temperature + row)
    if heat > 0:
        largest = tl.max(_load_chunks(best, row, NUM_CHUNKS, BLOCK_CHUNKS, float("-inf")), axis=0).to(tl.float64)
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        weight = _weights(logits + row * row_stride, token, vocabulary, largest, heat)
        tl.store(sums + row * NUM_CHUNKS + chunk, tl.sum(weight, axis=0))


@triton.jit
def _first_reaching(cumulative, has_any, target, total, index, beyond):
    """The first index at which a sum of something exceeds the target or is the whole; `beyond` if rounding leaves none."""
    reached = has_any & ((cumulative > target) | (cumulative >= total))
    return tl.min(tl.where(reached, index, beyond), axis=0)


@triton.jit
def _pick_kernel(
    logits, temperature, uniforms, best, best_token, sums, tokens, row_stride, vocabulary,
    CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr, BLOCK_CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK_CHUNKS)
    largest, where_best = tl.max(
        _load_chunks(best, row, NUM_CHUNKS, BLOCK_CHUNKS, float("-inf")), axis=0,
        return_indices=True, return_indices_tie_break_left=True,
    )
    heat = tl.load(temperature + row)
    is_number = (largest < float("inf")) & (largest > float("-inf"))
    if is_number & (heat > 0):
        mass = _load_chunks(sums, row, NUM_CHUNKS, BLOCK_CHUNKS, 0.0)
        cumulative = tl.cumsum(mass, axis=0)
        total = tl.max(cumulative, axis=0)
        target = tl.load(uniforms + row) * total
        # The chunk with the best logit has mass, so that one reaches the total but for rounding.
        last = tl.max(tl.where(mass > 0, index, 0), axis=0)
        chosen = _first_reaching(cumulative, mass > 0, target, total, index, last)
        end = tl.sum(tl.where(index == chosen, cumulative, 0.0), axis=0)
        before = tl.sum(tl.where(index == chosen - 1, cumulative, 0.0), axis=0)
        token = chosen * CHUNK + tl.arange(0, CHUNK)
        weight = _weights(logits + row * row_stride, token, vocabulary, largest.to(tl.float64), heat)
        last = tl.max(tl.where(weight > 0, token, 0), axis=0)
        drawn = _first_reaching(before + tl.cumsum(weight, axis=0), weight > 0, target, end, token, last)
        tl.store(tokens + row, drawn.to(tl.int64))
    else:
        greedy = tl.load(best_token + row * NUM_CHUNKS + where_best).to(tl.int64)
        tl.store(tokens + row, tl.where(is_number, greedy, _NOT_A_TOKEN))
