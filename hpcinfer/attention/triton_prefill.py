"""Varlen causal attention for GPUs over paged keys and values: entries of more than one token, context included. Imported only
where Triton is used.

Limited by the matrix rate: one program multiplies a tile of queries with one tile of keys and values after another (flash
attention; Dao et al. 2022), and skips those that the causal mask or the window hides from all its queries. The query heads of a
key/value head are rows of the same tile, so that short chunks fill it too. New tokens are read from the pages like the context.

Shape letters: T tokens, R entries, N query heads, K key/value heads, G = N / K, H head dim, S tokens in a page, P programs a
key/value head.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import triton
import triton.language as tl

from hpcinfer.attention.base import AttentionSpec
from hpcinfer.attention.metadata import AttentionMetadata, to_device
from hpcinfer.attention.triton_math import LISTS, LOG2_E, capped, has_shared_memory, page_offsets


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PrefillTiles:
    """The shape of a program's tiles. No choice is measured at run time: all ranks have the same."""

    rows: int
    """Queries times the query heads of a key/value head."""
    tokens: int
    """Of one tile of keys, and one of values."""
    warps: int
    stages: int
    """Of the loop's pipeline."""


def prefill_tiles(head_dim: int, group: int, itemsize: int, capability: tuple[int, int]) -> PrefillTiles:
    """The fixed table: the largest tiles that fit into the registers without spilling (tests compile all of it), with two tiles
    of keys and two of values in flight where the shared memory has room for them.

    Args:
        group: G, at most 64.
    """
    hopper, large = has_shared_memory(capability, 227), has_shared_memory(capability, 163)
    if itemsize == 4:  # no matrix units: float32 is multiplied exactly
        return PrefillTiles(rows=max(16, triton.next_power_of_2(group)), tokens=16, warps=4, stages=2)
    if head_dim > 128:
        return PrefillTiles(rows=128 if hopper else 64, tokens=32, warps=8, stages=5 if large else 3)
    return PrefillTiles(rows=128, tokens=64 if hopper or head_dim <= 64 else 32, warps=8, stages=5)


def prefill_programs(metadata: AttentionMetadata, entries: np.ndarray, *, tokens: int, window: int) -> torch.Tensor:
    """int32 [P, 2]: entry and first token of every program's queries, those with the most keys first, so that none of these
    starts when the others have ended.

    Args:
        entries: which of the microbatch's entries.
        tokens: queries of one program.
        window: 0 without one.
    """
    lens = metadata.host_query_lens[entries]
    counts = -(-lens // tokens)
    entry = np.repeat(entries, counts)
    first = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * tokens
    keys = metadata.host_seq_lens[entry] - metadata.host_query_lens[entry] + first
    if window:
        keys = np.minimum(keys, window)
    order = np.argsort(-keys, kind="stable")
    programs = np.stack((entry[order], first[order]), axis=1).astype(np.int32)
    return to_device(torch.from_numpy(programs), metadata.seq_lens.device)


def prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    metadata: AttentionMetadata,
    spec: AttentionSpec,
    *,
    tiles: PrefillTiles,
    programs: torch.Tensor,
) -> None:
    """Attend for the entries of `programs`.

    Args:
        q: [T, N, H], any strides with a contiguous last dim.
        k_cache, v_cache: contiguous [block, S, K, H].
        out: [T, N, H] contiguous; the rows of the entries are written.
        tiles: of the table.
        programs: of `prefill_programs`, with tiles.rows // G tokens.
    """
    group = spec.num_heads // spec.num_kv_heads
    prefill_kernel[(spec.num_kv_heads, len(programs))](
        q, k_cache, v_cache, out, programs, metadata.block_tables, metadata.seq_lens, metadata.query_start_loc,
        q if spec.sinks is None else spec.sinks,
        q.stride(0), q.stride(1), metadata.block_tables.stride(0), spec.scale * LOG2_E,
        PAGE=metadata.block_size, ROWS=tiles.rows, TOKENS=tiles.rows // group, TILE=tiles.tokens,
        SOFTCAP=spec.softcap or 0.0, WINDOW=spec.sliding_window or 0, HAS_SINKS=spec.sinks is not None,
        NUM_KV_HEADS=spec.num_kv_heads, GROUP=group, HEAD_DIM=spec.head_dim,
        COLUMNS=triton.next_power_of_2(spec.head_dim), num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True,
    )


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=LISTS)
def prefill_kernel(
    q, k_cache, v_cache, out, programs, block_tables, seq_lens, query_start_loc, sinks,
    q_token_stride, q_head_stride, table_stride, scale_log2,
    PAGE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid [K, P]. scale_log2: the scale times log2(e), as all exponentials are of base 2."""
    head, place = tl.program_id(0), tl.program_id(1)
    entry = tl.load(programs + 2 * place)
    first_token = tl.load(programs + 2 * place + 1)
    row = tl.load(query_start_loc + entry).to(tl.int64)
    query_len = (tl.load(query_start_loc + entry + 1) - row).to(tl.int32)
    context = tl.load(seq_lens + entry) - query_len

    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    tokens = first_token + rows // GROUP
    heads = head * GROUP + rows % GROUP
    end = context + tl.minimum(first_token + TOKENS, query_len)
    positions = tl.minimum(context + tokens, end - 1)  # so that rows which are not used see something too
    used = ((rows < TOKENS * GROUP) & (tokens < query_len))[:, None] & (columns < HEAD_DIM)[None, :]
    queries = tl.load(
        q + (row + tokens)[:, None] * q_token_stride + heads[:, None] * q_head_stride + columns[None, :], mask=used, other=0.0
    )
    if HAS_SINKS:  # as if a key with this score and a value of zero had come first
        top = tl.load(sinks + heads).to(tl.float32) * 1.4426950408889634
        total = tl.full([ROWS], 1.0, tl.float32)
    else:
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)

    # Keys of all queries of this tile: from `low` to `end`; those from `seen_by_all` to `masked` no mask touches.
    table = block_tables + entry.to(tl.int64) * table_stride
    masked = (context + first_token + 1) // TILE * TILE
    low = tl.maximum(context + first_token - WINDOW + 1, 0) if WINDOW > 0 else 0
    begin = low // TILE * TILE
    cache = head * HEAD_DIM
    if WINDOW > 0:
        seen_by_all = tl.cdiv(tl.maximum(end - WINDOW, 0), TILE) * TILE
        sums, top, total = attend(
            sums, top, total, queries, k_cache + cache, v_cache + cache, table, positions, low, end, begin,
            tl.minimum(seen_by_all, end), scale_log2, True,
            PAGE, TILE, SOFTCAP, WINDOW, NUM_KV_HEADS * HEAD_DIM, HEAD_DIM, COLUMNS,
        )
        masked = tl.maximum(masked, seen_by_all)
        begin = seen_by_all
    sums, top, total = attend(
        sums, top, total, queries, k_cache + cache, v_cache + cache, table, positions, low, end, begin, masked, scale_log2, False,
        PAGE, TILE, SOFTCAP, WINDOW, NUM_KV_HEADS * HEAD_DIM, HEAD_DIM, COLUMNS,
    )
    sums, top, total = attend(
        sums, top, total, queries, k_cache + cache, v_cache + cache, table, positions, low, end, masked, end, scale_log2, True,
        PAGE, TILE, SOFTCAP, WINDOW, NUM_KV_HEADS * HEAD_DIM, HEAD_DIM, COLUMNS,
    )
    to = out + ((row + tokens) * (NUM_KV_HEADS * GROUP) + heads)[:, None] * HEAD_DIM + columns[None, :]
    tl.store(to, (sums / total[:, None]).to(out.dtype.element_ty), mask=used)


@triton.jit
def attend(
    sums, top, total, queries, k_cache, v_cache, table, positions, low, end, begin, stop, scale_log2, MASKED: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the tiles from `begin` to `stop` to the running sums, their maximum and their total; keys are from `low` to `end`."""
    columns = tl.arange(0, COLUMNS)
    for at in range(begin, stop, TILE):
        keys_at = at + tl.arange(0, TILE)
        wanted = (keys_at >= low) & (keys_at < end)
        offsets = page_offsets(table, at, keys_at, wanted, PAGE, TILE) * STRIDE
        # Values that are not loaded are 0: what lies there may be NaN.
        loaded = wanted[:, None] & (columns < HEAD_DIM)[None, :] if MASKED else (columns < HEAD_DIM)[None, :]
        keys = tl.load(k_cache + offsets[:, None] + columns[None, :], mask=loaded, other=0.0)
        scores = capped(tl.dot(queries, tl.trans(keys), input_precision="ieee"), scale_log2, SOFTCAP)
        if MASKED:
            seen = (keys_at[None, :] <= positions[:, None]) & wanted[None, :]
            if WINDOW > 0:
                seen = seen & (keys_at[None, :] > positions[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        high = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen nothing yet has -inf here: -inf - -inf is NaN.
        shift = tl.where(high == float("-inf"), 0.0, high) if MASKED else high
        weights = tl.exp2(scores - shift[:, None])
        kept = tl.exp2(top - shift)
        total = total * kept + tl.sum(weights, 1)
        values = tl.load(v_cache + offsets[:, None] + columns[None, :], mask=loaded, other=0.0)
        sums = sums * kept[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        top = high
    return sums, top, total
