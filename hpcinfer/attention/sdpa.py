"""torch's scaled_dot_product_attention over pages: the backend of CPU ranks, and one that works on any device.

Decodes are batched: the tokens of some sequences of similar length are gathered from the pages into one padded tensor.
Prefill chunks run one sequence at a time: from k and v in hand when the chunk is the start of its prompt, otherwise
from gathered tokens with a mask.

Shape letters: T tokens, R sequences, r sequences of a group, N query heads, K key/value heads, G = N / K, H head dim,
L keys of the longest sequence of a group.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F

from hpcinfer.attention.base import AttentionBackend, AttentionQuery, AttentionSpec, refuse_features
from hpcinfer.attention.metadata import AttentionMetadata, to_device, token_slots
from hpcinfer.kvcache.layout import KvLayout

# Elements of keys gathered for one group of decodes. Measured on CPU (64 sequences of 80-192 tokens, K 8, H 128):
# groups whose keys and values stay in the cache between gather and attention take 10 ms a layer, one of all 16-18.
_GROUP_ELEMENTS = 1_500_000
# Elements of one mask: longer chunks are cut into pieces of queries, which also skips keys that none of a piece sees.
_MASK_ELEMENTS = 2**21


@dataclasses.dataclass(slots=True)
class _Decodes:
    """Sequences with one query each, padded to the longest."""

    rows: torch.Tensor | slice
    """Which of the T tokens."""
    slots: torch.Tensor
    """int64 [r * L]."""
    length: int
    """L."""
    mask: torch.Tensor | None
    """[r, 1, 1, L] in the dtype of q, 0 or -inf."""


@dataclasses.dataclass(slots=True)
class _Chunk:
    """Some consecutive queries of one sequence."""

    rows: slice
    slots: torch.Tensor | None
    """int64 [L]; None: the keys and values in hand, causally."""
    mask: torch.Tensor | None
    """[rows, L] in the dtype of q, 0 or -inf."""


class SdpaBackend(AttentionBackend):
    """Attention by torch.nn.functional.scaled_dot_product_attention."""

    name = "SDPA"

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def refuses(self, query: AttentionQuery) -> str | None:
        return refuse_features(query, window=True, sinks=query.device_type == "cpu")

    def kv_layout(self, block_size: int, num_kv_heads: int, head_dim: int) -> KvLayout:
        # Token before head: a token's keys of all heads are one contiguous row, which gathers 2-4 times faster than
        # pages with heads outermost, and a padded batch needs no transpose.
        return KvLayout(block_size=block_size, num_kv_heads=num_kv_heads, head_dim=head_dim)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        key = (self.name, spec.sliding_window)
        plan = metadata.scratch.get(key)
        if plan is None:
            # Masks and slots are the same in all layers with the same window.
            plan = metadata.scratch[key] = _plan(metadata, spec, q.dtype, q.device)
        k_slots, v_slots = k_cache.flatten(0, 1), v_cache.flatten(0, 1)  # [B * S, K, H]
        for group in plan[0]:
            keys, values = self._gather(k_slots, "k", group.slots), self._gather(v_slots, "v", group.slots)
            _attend_decodes(q, keys, values, group, spec, out)
        for chunk in plan[1]:
            if chunk.slots is None:
                keys, values = k[chunk.rows], v[chunk.rows]
            else:
                keys, values = self._gather(k_slots, "k", chunk.slots), self._gather(v_slots, "v", chunk.slots)
            attended = _attend(
                q[chunk.rows].transpose(0, 1)[None], keys.transpose(0, 1)[None], values.transpose(0, 1)[None],
                mask=chunk.mask, is_causal=chunk.mask is None, scale=spec.scale,
                sinks=None if spec.sinks is None else spec.sinks[:, None],
            )
            out[chunk.rows] = attended[0].transpose(0, 1)
        return out

    def _gather(self, slots_of_cache: torch.Tensor, name: str, slots: torch.Tensor) -> torch.Tensor:
        """Rows `slots` of [B * S, K, H], in a buffer that the next call with the same name overwrites."""
        # A buffer of our own: malloc gives large blocks back to the kernel at once, and touching fresh pages costs
        # several times the copy.
        shape = (len(slots), *slots_of_cache.shape[1:])
        size = len(slots) * slots_of_cache[0].numel()
        buffer = self._buffers.get(name)
        if (
            buffer is None or buffer.numel() < size
            or buffer.dtype != slots_of_cache.dtype or buffer.device != slots_of_cache.device
        ):
            buffer = torch.empty(max(size, _GROUP_ELEMENTS), dtype=slots_of_cache.dtype, device=slots_of_cache.device)
            self._buffers[name] = buffer
        rows = buffer[:size].view(shape)
        torch.index_select(slots_of_cache, 0, slots, out=rows)
        return rows


def _attend_decodes(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: _Decodes, spec: AttentionSpec, out: torch.Tensor
) -> None:
    """q [T, N, H]; keys and values [r * L, K, H]; writes the group's rows of out [T, N, H]."""
    queries = q[group.rows]
    num, heads, dim = queries.shape
    # The G query heads of a key/value head become G queries of it: one mask row serves all, and bfloat16 on CPU is 5-9
    # times faster than with enable_gqa.
    queries = queries.reshape(num, spec.num_kv_heads, heads // spec.num_kv_heads, dim)
    shape = (num, group.length, spec.num_kv_heads, dim)
    attended = _attend(
        queries, keys.view(shape).transpose(1, 2), values.view(shape).transpose(1, 2),
        mask=group.mask, is_causal=False, scale=spec.scale,
        sinks=None if spec.sinks is None else spec.sinks.view(spec.num_kv_heads, -1),
    )
    out[group.rows] = attended.reshape(num, heads, dim)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """q [batch, heads, queries, H], k and v [batch, heads or fewer, L, H]; sinks broadcast against [heads, queries]."""
    if sinks is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    # The kernel divides by the sum over the keys, exp(log_sum); with the sink the divisor is exp(log_sum) + exp(sink).
    return out.mul_(torch.sigmoid(log_sum - sinks)[..., None])


def _plan(
    metadata: AttentionMetadata, spec: AttentionSpec, dtype: torch.dtype, device: torch.device
) -> tuple[list[_Decodes], list[_Chunk]]:
    lens = metadata.host_query_lens
    groups = _plan_decodes(metadata, np.flatnonzero(lens == 1), spec, dtype, device)
    chunks = [
        chunk for r in np.flatnonzero(lens > 1) for chunk in _plan_prefill(metadata, int(r), spec, dtype, device)
    ]
    return groups, chunks


def _plan_decodes(
    metadata: AttentionMetadata, sequences: np.ndarray, spec: AttentionSpec, dtype: torch.dtype, device: torch.device
) -> list[_Decodes]:
    """Sort by length and cut into groups, so that little of a group is padding and its keys stay in the cache."""
    window = spec.sliding_window
    visible = metadata.host_seq_lens[sequences]
    if window is not None:
        visible = np.minimum(visible, window)
    order = np.argsort(-visible, kind="stable")
    sequences, visible = sequences[order], visible[order]
    groups = []
    start = 0
    while start < len(sequences):
        length = int(visible[start])
        most = max(1, _GROUP_ELEMENTS // (length * spec.num_kv_heads * spec.head_dim))
        # Beyond a quarter of padding a further call is cheaper, except among short sequences.
        similar = int(np.searchsorted(-visible, -max(1, 3 * length // 4 if length > 64 else 1), side="right"))
        end = min(start + most, max(similar, start + 1))
        groups.append(_decode_group(metadata, np.sort(sequences[start:end]), length, window, dtype, device))
        start = end
    return groups


def _decode_group(
    metadata: AttentionMetadata,
    sequences: np.ndarray,
    length: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> _Decodes:
    lens = metadata.host_seq_lens[sequences]
    first = np.maximum(lens - window, 0) if window is not None else np.zeros_like(lens)
    # Padding reads the sequence's last token again: a slot that is known to hold finite numbers and is in the cache.
    positions = np.minimum(first[:, None] + np.arange(length), lens[:, None] - 1)
    slots = token_slots(metadata.host_block_tables, sequences[:, None], positions, metadata.block_size)
    padded = np.arange(length) >= (lens - first)[:, None]
    mask = None
    if padded.any():
        mask = torch.zeros(padded.shape, dtype=dtype).masked_fill_(torch.from_numpy(padded), float("-inf"))
        mask = to_device(mask, device)[:, None, None]
    rows = metadata.host_query_start_loc[sequences]
    contiguous = rows[-1] - rows[0] == len(rows) - 1
    return _Decodes(
        rows=slice(int(rows[0]), int(rows[-1]) + 1) if contiguous else to_device(torch.from_numpy(rows), device),
        slots=to_device(torch.from_numpy(slots.reshape(-1)), device),
        length=length,
        mask=mask,
    )


def _plan_prefill(
    metadata: AttentionMetadata, r: int, spec: AttentionSpec, dtype: torch.dtype, device: torch.device
) -> list[_Chunk]:
    start, end = (int(i) for i in metadata.host_query_start_loc[r : r + 2])
    seq_len, window = int(metadata.host_seq_lens[r]), spec.sliding_window
    context = seq_len - (end - start)
    if context == 0 and (window is None or seq_len <= window):
        return [_Chunk(rows=slice(start, end), slots=None, mask=None)]
    chunks = []
    rows = max(1, _MASK_ELEMENTS // seq_len)
    for first in range(start, end, rows):
        last = min(first + rows, end)
        queries = np.arange(first, last) - start + context
        low = 0 if window is None else max(0, int(queries[0]) - window + 1)
        keys = np.arange(low, int(queries[-1]) + 1)
        slots = token_slots(metadata.host_block_tables, np.int64(r), keys, metadata.block_size)
        hidden = keys[None] > queries[:, None]
        if window is not None:
            hidden |= keys[None] <= queries[:, None] - window
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(torch.from_numpy(hidden), float("-inf"))
        chunks.append(
            _Chunk(rows=slice(first, last), slots=to_device(torch.from_numpy(slots), device), mask=to_device(mask, device))
        )
    return chunks
