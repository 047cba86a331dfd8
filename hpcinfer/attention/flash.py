"""The flash-attention libraries over pages: FlashAttention 3 on Hopper, FlashAttention 2 on Ampere, Ada, and where 3 is missing.

Signatures as documented in flash_attn/flash_attn_interface.py (2.8) and hopper/flash_attn_interface.py of the flash-attention
repository. Both align the causal mask to the end of the keys, which is where the microbatch's tokens stand.

Shape letters: T tokens, R entries, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import re

import torch

from hpcinfer.attention.base import (
    AttentionBackend, AttentionQuery, AttentionSpec, refuse_device, refuse_features, version,
)  # fmt: skip
from hpcinfer.attention.metadata import AttentionMetadata
from hpcinfer.kvcache.layout import KvLayout

FLASH_2, FLASH_3 = "flash_attn", "flash_attn_interface"
"""Names of the packages."""

_DTYPES = (torch.bfloat16, torch.float16)
_LARGEST_HEAD = 256
_FLASH_2_PAGE = 256
_FLASH_3_CUDA = (12, 3)
_FLASH_2_WAITS = (2, 8, 4)
"""From this version on flash_attn_with_kvcache reads the longest length back from the device, which stops the host and cannot be
captured; flash_attn_varlen_func never does."""


class FlashBackend(AttentionBackend):
    """Attention by `flash_attn_with_kvcache` and `flash_attn_varlen_func` with block tables."""

    name = "FLASH_ATTN"
    capturable = True

    def refuses(self, query: AttentionQuery) -> str | None:
        if reason := refuse_features(query, window=True, softcap=True):
            return reason
        if reason := refuse_device(query, capability=(8, 0), dtypes=_DTYPES):
            return reason
        if query.capability >= (10, 0):
            return f"flash-attention is used up to compute capability 9.0, this GPU has {version(query.capability)}"
        if query.head_dim > _LARGEST_HEAD or query.head_dim % 8:
            return f"head size {query.head_dim} not supported (multiples of 8 up to {_LARGEST_HEAD})"
        if package_for(query) not in query.packages:
            return _missing(query)
        if package_for(query) == FLASH_2 and query.block_size % _FLASH_2_PAGE:
            return (
                f"pages of {query.block_size} tokens: {FLASH_2} reads pages of a multiple of {_FLASH_2_PAGE} "
                f"(engine.block_size = {_FLASH_2_PAGE}, or 0 to leave it to the backend)"
            )
        return None

    def preferred_block_size(self, query: AttentionQuery) -> int:
        # FlashAttention 3 takes any; from pages of 128 it can load whole tiles at once (hopper/tile_size.h).
        return _FLASH_2_PAGE if package_for(query) == FLASH_2 else 128

    def prepare(self, query: AttentionQuery) -> None:
        if package_for(query) == FLASH_3:
            from flash_attn_interface import flash_attn_with_kvcache

            self._attend, self._with_kvcache = self._attend_3, flash_attn_with_kvcache
        else:
            import flash_attn

            self._attend, self._with_kvcache = self._attend_2, flash_attn.flash_attn_with_kvcache
            self._varlen = flash_attn.flash_attn_varlen_func
            self._waits = tuple(map(int, re.findall(r"\d+", flash_attn.__version__)[:3])) >= _FLASH_2_WAITS

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
        if not len(q):
            return torch.empty(q.shape, dtype=q.dtype, device=q.device)
        return self._attend(q, k_cache, v_cache, metadata, spec).contiguous()

    def _attend_2(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, metadata: AttentionMetadata, spec: AttentionSpec
    ) -> torch.Tensor:
        settings = {**_settings(spec), "block_table": metadata.block_tables}
        if metadata.only_decodes and not self._waits:
            return self._with_kvcache(
                q[:, None], k_cache, v_cache, cache_seqlens=metadata.seq_lens, **settings
            ).squeeze(1)
        return self._varlen(
            q, k_cache, v_cache, cu_seqlens_q=metadata.query_start_loc, cu_seqlens_k=_key_starts(metadata),
            max_seqlen_q=metadata.max_query_len, max_seqlen_k=metadata.max_seq_len, **settings,
        )

    def _attend_3(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, metadata: AttentionMetadata, spec: AttentionSpec
    ) -> torch.Tensor:
        settings = {**_settings(spec), "page_table": metadata.block_tables, "cache_seqlens": metadata.seq_lens}
        if metadata.only_decodes:
            return self._with_kvcache(q[:, None], k_cache, v_cache, **settings).squeeze(1)
        return self._with_kvcache(
            q, k_cache, v_cache, cu_seqlens_q=metadata.query_start_loc, max_seqlen_q=metadata.max_query_len, **settings
        )


def package_for(query: AttentionQuery) -> str:
    """Which library computes on this GPU: 3 where it can, else 2."""
    hopper = query.capability is not None and query.capability[0] == 9
    return FLASH_3 if hopper and (query.cuda_version or (0, 0)) >= _FLASH_3_CUDA and FLASH_3 in query.packages else FLASH_2


def _missing(query: AttentionQuery) -> str:
    second = f"{FLASH_2} is not installed: pip install flash-attn --no-build-isolation"
    if query.capability[0] != 9:
        return second
    if (query.cuda_version or (0, 0)) < _FLASH_3_CUDA:
        return f"{second} (FlashAttention 3 needs CUDA {version(_FLASH_3_CUDA)} or newer)"
    return (
        f"{FLASH_3} (FlashAttention 3) is not installed: pip install "
        '"git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper" --no-build-isolation; '
        f"nor is FlashAttention 2: pip install flash-attn --no-build-isolation"
    )


def _settings(spec: AttentionSpec) -> dict:
    """Arguments that all functions share. Windows include their ends: the token itself and window - 1 before it."""
    return {
        "softmax_scale": spec.scale,
        "causal": True,
        "window_size": (-1, -1) if spec.sliding_window is None else (spec.sliding_window - 1, 0),
        "softcap": spec.softcap or 0.0,
    }


def _key_starts(metadata: AttentionMetadata) -> torch.Tensor:
    """int32 [R + 1]: the sum of the lengths before each sequence; made on the device, so that it can be captured."""
    key = (FlashBackend.name, "key_starts")
    if key not in metadata.scratch:
        ends = torch.cumsum(metadata.seq_lens, 0, dtype=torch.int32)
        metadata.scratch[key] = torch.nn.functional.pad(ends, (1, 0))
    return metadata.scratch[key]
