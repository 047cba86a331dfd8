"""Own kernels in Triton: paged decode and varlen prefill, with sliding window, softcap and sinks, on NVIDIA GPUs.

Shape letters: T tokens, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from hpcinfer.attention.base import AttentionBackend, AttentionQuery, AttentionSpec, refuse_device, refuse_features
from hpcinfer.attention.metadata import AttentionMetadata, to_device
from hpcinfer.kvcache.layout import KvLayout

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LARGEST_HEAD = 256
_LARGEST_GROUP = 64


class TritonBackend(AttentionBackend):
    """Attention by the kernels of `triton_decode` and `triton_prefill`."""

    name = "TRITON"
    capturable = True

    def refuses(self, query: AttentionQuery) -> str | None:
        if reason := refuse_features(query, window=True, softcap=True, sinks=True):
            return reason
        if reason := refuse_device(query, capability=(8, 0), dtypes=_DTYPES):
            return reason
        if query.head_dim > _LARGEST_HEAD or query.head_dim % 8:
            return f"head size {query.head_dim} not supported (multiples of 8 up to {_LARGEST_HEAD})"
        if query.num_heads > _LARGEST_GROUP * query.num_kv_heads:
            return f"{query.num_heads // query.num_kv_heads} query heads a key/value head (at most {_LARGEST_GROUP})"
        if "triton" not in query.packages:
            return "triton is not installed: pip install triton"
        return None

    def preferred_block_size(self, query: AttentionQuery) -> int:
        return 64  # a tile of keys lies inside one page

    def prepare(self, query: AttentionQuery) -> None:
        # The only files that import triton.
        from hpcinfer.attention.triton_decode import decode, decode_tiles
        from hpcinfer.attention.triton_prefill import prefill, prefill_programs, prefill_tiles

        group, machine = query.num_heads // query.num_kv_heads, (query.dtype.itemsize, query.capability)
        tiles = prefill_tiles(query.head_dim, group, *machine)
        self._decode = functools.partial(decode, tiles=decode_tiles(query.head_dim, *machine))
        self._prefill = functools.partial(prefill, tiles=tiles)
        self._programs = functools.partial(prefill_programs, tokens=tiles.rows // group)

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
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        tensors = (q, k_cache, v_cache, out, metadata, spec)
        if not metadata.num_entries:
            return out
        if metadata.only_decodes:
            self._decode(*tensors)
            return out
        key = (self.name, spec.sliding_window)
        if key not in metadata.scratch:
            metadata.scratch[key] = self._plan(metadata, spec.sliding_window or 0)
        entries, programs = metadata.scratch[key]
        if entries is not None:
            self._decode(*tensors, entries=entries)
        if len(programs):
            self._prefill(*tensors, programs=programs)
        return out

    def _plan(self, metadata: AttentionMetadata, window: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The entries that decode, int32, and the programs of those that do not."""
        lens = metadata.host_query_lens
        decodes = np.flatnonzero(lens == 1).astype(np.int32)
        entries = to_device(torch.from_numpy(decodes), metadata.seq_lens.device) if len(decodes) else None
        return entries, self._programs(metadata, np.flatnonzero(lens > 1), window=window)
