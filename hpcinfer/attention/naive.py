"""The reference: attention as the formula says, one sequence at a time, in float32 or float64.

Slow on purpose. Every other backend is compared with it. Shape letters: T tokens, N query heads, K key/value heads,
H head dim, L tokens of one sequence.
"""

from __future__ import annotations

import torch

from hpcinfer.attention.base import AttentionBackend, AttentionQuery, AttentionSpec, refuse_features
from hpcinfer.attention.metadata import AttentionMetadata
from hpcinfer.kvcache.layout import KvLayout


class NaiveBackend(AttentionBackend):
    """softmax(scale * q k^T + mask) v, with softcap and sinks, on any device and dtype."""

    name = "NAIVE"

    def refuses(self, query: AttentionQuery) -> str | None:
        return refuse_features(query, window=True, softcap=True, sinks=True)

    def kv_layout(self, block_size: int, num_kv_heads: int, head_dim: int) -> KvLayout:
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
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        for r in range(metadata.num_entries):
            start, end = (int(i) for i in metadata.host_query_start_loc[r : r + 2])
            if start == end:
                continue
            length = int(metadata.host_seq_lens[r])
            blocks = metadata.block_tables[r, : -(-length // metadata.block_size)].long()
            keys = k_cache[blocks].flatten(0, 1)[:length]  # [L, K, H]
            values = v_cache[blocks].flatten(0, 1)[:length]
            out[start:end] = _attend(q[start:end], keys, values, metadata.positions[start:end], spec)
        return out


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, spec: AttentionSpec
) -> torch.Tensor:
    """q [T, N, H] at `positions` [T] over k and v [L, K, H] at positions 0 to L - 1. Returns [T, N, H]."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = spec.num_heads // spec.num_kv_heads
    q, k, v = (t.to(compute) for t in (q, k, v))
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scores = torch.einsum("tnh,lnh->ntl", q, k) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    key_positions = torch.arange(k.shape[0], device=q.device)
    hidden = key_positions[None] > positions[:, None]
    if spec.sliding_window is not None:
        hidden |= key_positions[None] <= positions[:, None] - spec.sliding_window
    scores = scores.masked_fill(hidden, float("-inf"))
    if spec.sinks is not None:
        sinks = spec.sinks.to(compute)[:, None, None].expand(-1, scores.shape[1], 1)
        weights = torch.softmax(torch.cat((scores, sinks), dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    return torch.einsum("ntl,lnh->tnh", weights, v)
