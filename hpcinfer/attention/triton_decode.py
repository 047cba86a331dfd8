"""Paged decode attention for GPUs: one query token a sequence. Imported only where Triton is used.

Limited by memory bandwidth: every key and value is read once. One program attends with all query heads of one key/value head
over one split of a sequence; where a sequence has several splits, a second kernel joins them by their log-sums
(flash-decoding; Dao et al. 2023). How many splits there are depends on the number of sequences and on the longest one, how
long they are on each sequence alone, on the device: so a launch can be captured in a CUDA graph with the host's numbers as
upper bounds.

Shape letters: R sequences, N query heads, K key/value heads, G = N / K, H head dim, B blocks in a table, S tokens in a page.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from hpcinfer.attention.base import AttentionSpec
from hpcinfer.attention.metadata import AttentionMetadata
from hpcinfer.attention.triton_math import LISTS, LOG2_E, capped, has_shared_memory, page_offsets

_PROGRAMS = 512
"""Splits are added until there are so many programs: about four for each multiprocessor of the GPUs in question."""
_LONGEST_SPLIT = 16384
"""Tokens, of the longest sequence there can be: one among many short ones would otherwise keep a few programs busy alone."""
_MAX_SPLITS = 128
_LEAST_TILES = 2
"""Of a split: a shorter one costs more than it saves."""
_JOINED = 16
"""Splits that the second kernel reads at once."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecodeTiles:
    """How a program reads keys and values. No choice is measured at run time: all ranks have the same."""

    tokens: int
    """Of one tile of keys, and one of values."""
    warps: int
    stages: int
    """Of the loop's pipeline."""


def decode_tiles(head_dim: int, itemsize: int, capability: tuple[int, int]) -> DecodeTiles:
    """The fixed table. 5 stages keep two tiles of keys and two of values in flight: a page's number is fetched first, the tiles
    two stages before their use. 16 KiB a tile, 8 where a multiprocessor has less than 163 KiB of shared memory and for float32,
    which needs more registers: two programs or more fit on each."""
    large = itemsize < 4 and has_shared_memory(capability, 163)
    tokens = (16384 if large else 8192) // (triton.next_power_of_2(head_dim) * itemsize)
    return DecodeTiles(tokens=max(16, min(64, tokens)), warps=4, stages=5)


def decode_splits(num_programs: int, longest: int, tile: int) -> int:
    """Splits of every sequence.

    Args:
        num_programs: R K.
        longest: keys that the longest sequence may have to read.
        tile: tokens of one.
    """
    wanted = max(-(-_PROGRAMS // num_programs), -(-longest // _LONGEST_SPLIT))
    return max(1, min(wanted, -(-longest // (_LEAST_TILES * tile)), _MAX_SPLITS))


def decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    metadata: AttentionMetadata,
    spec: AttentionSpec,
    *,
    tiles: DecodeTiles,
    entries: torch.Tensor | None = None,
) -> None:
    """Attend for entries with one token each.

    Args:
        q: [T, N, H], any strides with a contiguous last dim.
        k_cache, v_cache: contiguous [block, S, K, H].
        out: [T, N, H] contiguous; the rows of the entries are written.
        tiles: of the table.
        entries: int32 [R]: which of the microbatch's entries. None: all.
    """
    num_entries = metadata.num_entries if entries is None else len(entries)
    num_heads, num_kv_heads = spec.num_heads, spec.num_kv_heads
    window = spec.sliding_window or 0
    longest = min(metadata.max_seq_len, window + tiles.tokens) if window else metadata.max_seq_len
    splits = decode_splits(num_entries * num_kv_heads, longest, tiles.tokens)
    columns = triton.next_power_of_2(spec.head_dim)
    if splits > 1:
        partial = torch.empty(
            (num_entries, num_heads, splits, spec.head_dim), dtype=torch.float32, device=q.device
        )
        log_sums = torch.empty((num_entries, num_heads, splits), dtype=torch.float32, device=q.device)
    else:
        partial = log_sums = q  # not touched
    lists = (metadata.seq_lens, metadata.query_start_loc, metadata.seq_lens if entries is None else entries)
    facts = {
        "NUM_KV_HEADS": num_kv_heads, "GROUP": num_heads // num_kv_heads, "HEAD_DIM": spec.head_dim, "COLUMNS": columns,
        "TILE": tiles.tokens, "LEAST": _LEAST_TILES, "WINDOW": window, "HAS_ENTRIES": entries is not None,
    }
    decode_kernel[(num_kv_heads, num_entries, splits)](
        q, k_cache, v_cache, out, partial, log_sums, metadata.block_tables, *lists,
        q if spec.sinks is None else spec.sinks,
        q.stride(0), q.stride(1), metadata.block_tables.stride(0), splits, spec.scale * LOG2_E,
        PAGE=metadata.block_size, ROWS=max(16, triton.next_power_of_2(num_heads // num_kv_heads)),
        SOFTCAP=spec.softcap or 0.0, HAS_SINKS=spec.sinks is not None, **facts,
        num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True,
    )
    if splits > 1:
        join_kernel[(num_heads, num_entries)](
            out, partial, log_sums, *lists, splits,
            SPLITS=triton.next_power_of_2(splits), JOINED=_JOINED, **facts, num_warps=4, enable_fp_fusion=True,
        )


@triton.jit
def split_tokens(length, first, num_splits, TILE: tl.constexpr, LEAST: tl.constexpr):
    """Where a sequence's first split begins, and the tokens of each: a multiple of TILE."""
    begin = first // TILE * TILE
    num_tiles = tl.cdiv(length - begin, TILE)
    return begin, tl.maximum(tl.cdiv(num_tiles, num_splits), LEAST) * TILE


@triton.jit(do_not_specialize=["num_splits", "table_stride"], do_not_specialize_on_alignment=LISTS)
def decode_kernel(
    q, k_cache, v_cache, out, partial, log_sums, block_tables, seq_lens, query_start_loc, entries, sinks,
    q_token_stride, q_head_stride, table_stride, num_splits, scale_log2,
    PAGE: tl.constexpr, ROWS: tl.constexpr, SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr,
    TILE: tl.constexpr, LEAST: tl.constexpr, WINDOW: tl.constexpr, HAS_ENTRIES: tl.constexpr,
):  # fmt: skip
    """Grid [K, R, splits]. scale_log2: the scale times log2(e), as all exponentials are of base 2."""
    head, place, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    entry = tl.load(entries + place) if HAS_ENTRIES else place
    length = tl.load(seq_lens + entry)
    first = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
    begin, per_split = split_tokens(length, first, num_splits, TILE, LEAST)
    start = begin + split * per_split
    if start >= length:
        return
    end = tl.minimum(start + per_split, length)

    rows, columns, tokens = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, TILE)
    heads = head * GROUP + rows
    row = tl.load(query_start_loc + entry).to(tl.int64)
    queries = tl.load(
        q + row * q_token_stride + heads[:, None] * q_head_stride + columns[None, :],
        mask=(rows < GROUP)[:, None] & (columns < HEAD_DIM)[None, :], other=0.0,
    )
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if HAS_SINKS:  # as if a key with this score and a value of zero had come first
        if split == 0:
            top = tl.load(sinks + heads, mask=rows < GROUP, other=0.0).to(tl.float32) * 1.4426950408889634
            total += 1.0
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    table = block_tables + entry.to(tl.int64) * table_stride
    for at in range(start, end, TILE):
        positions = at + tokens
        # Every tile has at least one token that is seen, so `high` is finite.
        seen = (positions < end) & (positions >= first)
        offsets = page_offsets(table, at, positions, seen, PAGE, TILE) * (NUM_KV_HEADS * HEAD_DIM) + head * HEAD_DIM
        loaded = seen[:, None] & (columns < HEAD_DIM)[None, :]
        keys = tl.load(k_cache + offsets[:, None] + columns[None, :], mask=loaded, other=0.0)
        scores = capped(tl.dot(queries, tl.trans(keys), input_precision="ieee"), scale_log2, SOFTCAP)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        high = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - high[:, None])
        kept = tl.exp2(top - high)
        total = total * kept + tl.sum(weights, 1)
        top = high
        # Values that are not loaded are 0: what lies there may be NaN.
        values = tl.load(v_cache + offsets[:, None] + columns[None, :], mask=loaded, other=0.0)
        sums = sums * kept[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    sums = sums / total[:, None]
    stored = (rows < GROUP)[:, None] & (columns < HEAD_DIM)[None, :]
    if begin + per_split >= length:
        to = out + (row * (NUM_KV_HEADS * GROUP) + heads[:, None]) * HEAD_DIM + columns[None, :]
        tl.store(to, sums.to(out.dtype.element_ty), mask=stored)
    else:
        at_split = (place.to(tl.int64) * (NUM_KV_HEADS * GROUP) + heads) * num_splits + split
        tl.store(partial + at_split[:, None] * HEAD_DIM + columns[None, :], sums, mask=stored)
        tl.store(log_sums + at_split, top + tl.log2(total), mask=rows < GROUP)


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=LISTS)
def join_kernel(
    out, partial, log_sums, seq_lens, query_start_loc, entries, num_splits,
    SPLITS: tl.constexpr, JOINED: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr,
    TILE: tl.constexpr, LEAST: tl.constexpr, WINDOW: tl.constexpr, HAS_ENTRIES: tl.constexpr,
):  # fmt: skip
    """Grid [N, R]: the splits of one sequence and head, each weighted with its sum of exponentials."""
    head, place = tl.program_id(0), tl.program_id(1)
    entry = tl.load(entries + place) if HAS_ENTRIES else place
    length = tl.load(seq_lens + entry)
    first = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
    begin, per_split = split_tokens(length, first, num_splits, TILE, LEAST)
    used = tl.cdiv(length - begin, per_split)
    if used == 1:
        return
    columns = tl.arange(0, COLUMNS)
    base = (place.to(tl.int64) * (NUM_KV_HEADS * GROUP) + head) * num_splits
    all_splits = tl.arange(0, SPLITS)
    sizes = tl.load(log_sums + base + all_splits, mask=all_splits < used, other=float("-inf"))
    top = tl.max(sizes, 0)
    total = tl.sum(tl.exp2(sizes - top), 0)
    sums = tl.zeros([COLUMNS], tl.float32)
    for at in range(0, used, JOINED):
        splits = at + tl.arange(0, JOINED)
        weights = tl.exp2(tl.load(log_sums + base + splits, mask=splits < used, other=0.0) - top)
        parts = tl.load(
            partial + (base + splits)[:, None] * HEAD_DIM + columns[None, :],
            mask=(splits < used)[:, None] & (columns < HEAD_DIM)[None, :], other=0.0,
        )
        sums += tl.sum(weights[:, None] * parts, 0)
    row = tl.load(query_start_loc + entry).to(tl.int64)
    to = out + (row * (NUM_KV_HEADS * GROUP) + head) * HEAD_DIM + columns
    tl.store(to, (sums / total).to(out.dtype.element_ty), mask=columns < HEAD_DIM)
