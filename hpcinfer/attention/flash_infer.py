"""FlashInfer over pages. It compiles its kernels with nvcc when one is first used, so it is taken only where a job names it.

A wrapper plans a microbatch once (which program reads which pages) and runs it in every layer. A plan lives in its wrapper, and
several microbatches may be under way at once, so each has wrappers of its own; they come back when the microbatch is gone.

Signatures as documented in flashinfer 0.6.13 (decode.py, prefill.py, attention/_core.py).

Shape letters: T tokens, N query heads, K key/value heads, H head dim, S tokens in a page.
"""

from __future__ import annotations

import weakref

import numpy as np
import torch

from hpcinfer.attention.base import AttentionBackend, AttentionQuery, AttentionSpec, refuse_device, refuse_features
from hpcinfer.attention.metadata import AttentionMetadata
from hpcinfer.kvcache.layout import KvLayout

_DTYPES = (torch.bfloat16, torch.float16)
_HEADS = (64, 128, 256)
_WORKSPACE_BYTES = 128 * 2**20
"""What FlashInfer's documentation recommends; all wrappers share it, as they run one after another."""
_SCALAR_GROUPS = (1, 2, 3)
"""Query heads a key/value head that its decode kernel without matrix units takes, and that are too few for those units."""


class FlashInferBackend(AttentionBackend):
    """Attention by BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper and, with sinks,
    BatchAttentionWithAttentionSinkWrapper."""

    name = "FLASHINFER"

    def __init__(self) -> None:
        self._free: dict[tuple, list[_Planner]] = {}
        self._workspace: torch.Tensor | None = None

    def refuses(self, query: AttentionQuery) -> str | None:
        if reason := refuse_features(query, window=True, softcap=not query.sinks, sinks=True):
            return reason
        if reason := refuse_device(query, capability=(8, 0), dtypes=_DTYPES):
            return reason
        if query.head_dim not in _HEADS:
            return f"head size {query.head_dim} not supported (only {', '.join(map(str, _HEADS))})"
        if "flashinfer" not in query.packages:
            return "flashinfer is not installed: pip install flashinfer-python"
        if not query.packages & {"nvcc", "flashinfer_jit_cache"}:
            return "flashinfer compiles its kernels with nvcc, which is not found: load a CUDA toolkit, or pip install flashinfer-jit-cache"
        return None

    def preferred_block_size(self, query: AttentionQuery) -> int:
        return 16

    def prepare(self, query: AttentionQuery) -> None:
        import flashinfer

        self._library = flashinfer

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
        if not len(q):
            return out
        key = (self.name, spec.sliding_window, spec.sinks is not None)
        plan = metadata.scratch.get(key)
        if plan is None:
            plan = metadata.scratch[key] = self._plan(metadata, spec, q.dtype, q.device)
        extra = () if spec.sinks is None else (spec.sinks.float(), spec.scale)
        plan.planner.wrapper.run(q, (k_cache, v_cache), *extra, out=out)
        return out

    def _plan(
        self, metadata: AttentionMetadata, spec: AttentionSpec, dtype: torch.dtype, device: torch.device
    ) -> _Plan:
        decodes = metadata.only_decodes and spec.sinks is None
        kind = (decodes, spec.sinks is not None, spec.sliding_window is not None)
        free = self._free.setdefault(kind, [])
        planner = free.pop() if free else _Planner(self._make(decodes, spec, dtype, device))
        planner.plan(metadata, spec, dtype, decodes=decodes)
        plan = _Plan(planner)
        weakref.finalize(plan, free.append, planner)
        return plan

    def _make(self, decodes: bool, spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> object:
        """A wrapper for one microbatch at a time."""
        if self._workspace is None:
            self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        if spec.sinks is not None:
            return self._library.BatchAttentionWithAttentionSinkWrapper(
                self._workspace, "NHD", q_data_type=dtype, kv_data_type=dtype, head_dim_qk=spec.head_dim,
                head_dim_vo=spec.head_dim, window_left=_window_left(spec),
            )
        if decodes:
            matrix_units = spec.num_heads // spec.num_kv_heads not in _SCALAR_GROUPS
            return self._library.BatchDecodeWithPagedKVCacheWrapper(self._workspace, "NHD", use_tensor_cores=matrix_units)
        return self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")


class _Plan:
    """Keeps a planner busy for as long as its microbatch lives."""

    __slots__ = ("__weakref__", "planner")

    def __init__(self, planner: _Planner) -> None:
        self.planner = planner


class _Planner:
    """A wrapper, and the point in the stream from which on it may plan again: the host's copy of a plan is reused."""

    def __init__(self, wrapper) -> None:
        self.wrapper = wrapper
        self._copied: torch.cuda.Event | None = None

    def plan(
        self, metadata: AttentionMetadata, spec: AttentionSpec, dtype: torch.dtype, *, decodes: bool
    ) -> None:
        """Plan the microbatch's entries that have tokens."""
        if self._copied is not None:
            self._copied.synchronize()
        used = np.flatnonzero(metadata.host_query_lens > 0)
        lens = metadata.host_seq_lens[used]
        num_pages = -(-lens // metadata.block_size)
        columns = np.arange(num_pages.max())[None] < num_pages[:, None]
        pages = metadata.host_block_tables[used][:, : columns.shape[1]][columns]
        lists = (_starts(num_pages), _int32(pages), _int32((lens - 1) % metadata.block_size + 1))
        settings = {
            "window_left": _window_left(spec), "logits_soft_cap": spec.softcap, "sm_scale": spec.scale,
            "q_data_type": dtype, "kv_data_type": dtype,
        }
        sizes = (spec.num_heads, spec.num_kv_heads, spec.head_dim, metadata.block_size)
        if decodes:
            self.wrapper.plan(*lists, *sizes, **settings)
        else:
            self.wrapper.plan(_starts(metadata.host_query_lens[used]), *lists, *sizes, causal=True, **settings)
        if metadata.seq_lens.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()


def _window_left(spec: AttentionSpec) -> int:
    """Tokens before the query's own that it sees; -1: all."""
    return -1 if spec.sliding_window is None else spec.sliding_window - 1


def _starts(lens: np.ndarray) -> torch.Tensor:
    """int32 [len + 1] on the host, where plans are made."""
    return _int32(np.concatenate(([0], np.cumsum(lens))))


def _int32(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int32))
