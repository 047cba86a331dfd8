"""torch's FlexAttention: every feature on every dtype, compiled by torch on GPUs, as plain torch operations on CPU.

It knows no pages, so the keys and values that the microbatch sees are gathered once a layer into one row after another, and a
mask that is made once a step says which belong together. On a GPU the mask's list of blocks lets it skip the others.

Shape letters: T tokens, N query heads, K key/value heads, H head dim, L gathered keys, C tokens in a block of the mask.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable

import numpy as np
import torch

from hpcinfer.attention.base import AttentionBackend, AttentionQuery, AttentionSpec, refuse_device, refuse_features
from hpcinfer.attention.metadata import AttentionMetadata, to_device, token_slots
from hpcinfer.kvcache.layout import KvLayout

_GPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BLOCK = 128
"""C: the granularity of torch's kernels."""
_MOST_KERNELS = 64
"""That torch may compile: one for each window form, sinks, cap and dtype, each for sizes of 1 and for others."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    """What all layers with the same window share."""

    slots: torch.Tensor
    """int64 [L]: the slot of each gathered key."""
    mask: object
    """torch's BlockMask over [T, L]."""


class FlexBackend(AttentionBackend):
    """Attention by torch.nn.attention.flex_attention."""

    name = "FLEX_ATTENTION"

    def refuses(self, query: AttentionQuery) -> str | None:
        if reason := refuse_features(query, window=True, softcap=True, sinks=True):
            return reason
        if query.device_type == "cpu":
            return None
        if reason := refuse_device(query, capability=(8, 0), dtypes=_GPU_DTYPES):
            return reason
        return None if "triton" in query.packages else "triton, to which torch compiles it, is not installed: pip install triton"

    def prepare(self, query: AttentionQuery) -> None:
        # Takes a second to import, for a backend that few use.
        from torch.nn.attention.flex_attention import AuxRequest, flex_attention

        compiled = query.device_type == "cuda"
        if compiled:
            # Torch counts the kernels of all windows, sinks and dtypes together, and materialises the scores of what goes beyond.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_KERNELS)
        self._attend: Callable = torch.compile(flex_attention, dynamic=True) if compiled else _uncompiled(flex_attention)
        self._aux = AuxRequest

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
        key = (self.name, spec.sliding_window)
        plan = metadata.scratch.get(key)
        if plan is None:
            plan = metadata.scratch[key] = _plan(metadata, spec.sliding_window)
        keys, values = (cache.flatten(0, 1)[plan.slots].transpose(0, 1)[None] for cache in (k_cache, v_cache))
        settings = {
            "score_mod": _softcap(spec.softcap), "block_mask": plan.mask, "scale": spec.scale,
            "enable_gqa": spec.num_heads != spec.num_kv_heads,
        }
        queries = q.transpose(0, 1)[None]
        if spec.sinks is None:
            out = self._attend(queries, keys, values, **settings)
        else:
            out, aux = self._attend(queries, keys, values, return_aux=self._aux(lse=True), **settings)
            # The kernel divides by exp(lse), the sum over the keys; with the sink the divisor is exp(lse) + exp(sink).
            out = (out * torch.sigmoid(aux.lse - spec.sinks[:, None])[..., None]).to(q.dtype)
        return out[0].transpose(0, 1).contiguous()


def _uncompiled(flex_attention: Callable) -> Callable:
    def attend(*tensors: torch.Tensor, **settings: object) -> object:
        with warnings.catch_warnings():
            # That it is slow is known: on CPU it is chosen by name.
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            return flex_attention(*tensors, **settings)

    return attend


def _softcap(softcap: float | None) -> Callable | None:
    if softcap is None:
        return None

    def capped(score, batch, head, query, key):
        return softcap * torch.tanh(score / softcap)

    return capped


def _plan(metadata: AttentionMetadata, window: int | None) -> _Plan:
    """Which keys are gathered, every sequence's from the start of a block of the mask on, and who sees which."""
    from torch.nn.attention.flex_attention import BlockMask

    lens, seq_lens = metadata.host_query_lens, metadata.host_seq_lens
    used = np.flatnonzero(lens > 0)
    first = np.maximum(seq_lens - lens - (window or 0) + 1, 0) if window else np.zeros_like(seq_lens)
    num_blocks = -(-(seq_lens - first)[used] // _BLOCK)
    entry = np.repeat(used, num_blocks * _BLOCK)
    begins = (np.cumsum(num_blocks) - num_blocks) * _BLOCK
    positions = np.arange(len(entry)) - np.repeat(begins, num_blocks * _BLOCK) + first[entry]
    # Padding has positions that no query reaches, and reads the last token again: a slot that is known to hold finite numbers.
    slots = token_slots(metadata.host_block_tables, entry, np.minimum(positions, seq_lens[entry] - 1), metadata.block_size)

    def tensor(values: np.ndarray, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return to_device(torch.from_numpy(values).to(dtype), metadata.seq_lens.device)

    key_entry, key_position = tensor(entry), tensor(positions)
    query_entry = tensor(np.repeat(np.arange(len(lens)), lens))
    query_position = metadata.positions

    def seen(batch, head, query, key):
        same = query_entry[query] == key_entry[key]
        earlier = key_position[key] <= query_position[query]
        if window is None:
            return same & earlier
        return same & earlier & (key_position[key] > query_position[query] - window)

    counts, indices = _blocks(metadata, used, first, num_blocks, window)
    mask = BlockMask.from_kv_blocks(
        tensor(counts)[None, None], tensor(indices)[None, None], BLOCK_SIZE=_BLOCK, mask_mod=seen,
        seq_lengths=(metadata.num_tokens, len(entry)),
    )
    return _Plan(tensor(slots, torch.int64), mask)


def _blocks(
    metadata: AttentionMetadata, used: np.ndarray, first: np.ndarray, num_blocks: np.ndarray, window: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """For each block of queries the blocks of keys that it needs: their number, and first in each row their indices."""
    starts = metadata.host_query_start_loc
    needed = np.zeros((-(-metadata.num_tokens // _BLOCK), int(num_blocks.sum())), bool)
    for entry, begin in zip(used, np.cumsum(num_blocks) - num_blocks, strict=True):
        context = metadata.host_seq_lens[entry] - metadata.host_query_lens[entry] - starts[entry]
        for block in range(starts[entry] // _BLOCK, -(-starts[entry + 1] // _BLOCK)):
            low = context + max(block * _BLOCK, starts[entry])  # position of the block's first token of this entry
            high = context + min((block + 1) * _BLOCK, starts[entry + 1])
            seen_from = max(low - window + 1, 0) if window else 0
            needed[block, begin + (seen_from - first[entry]) // _BLOCK : begin - (first[entry] - high) // _BLOCK] = True
    return needed.sum(1), np.argsort(~needed, axis=1, kind="stable")
