"""Stand-ins for flash_attn (2.8) and flash_attn_interface (FlashAttention 3): the documented arguments, the checks that the
libraries make before they launch a kernel (csrc/flash_attn/flash_api.cpp, hopper/flash_api.cpp), and float32 torch behind them.

What a kernel takes on trust is checked too: lengths within the block table, and host numbers that are upper bounds.
"""

from __future__ import annotations

import types

import torch

from tests.contract.paged_reference import attend


def flash_attn(version: str) -> types.ModuleType:
    """The module `flash_attn` of that version."""
    module = types.ModuleType("flash_attn")
    module.__version__ = version
    module.flash_attn_varlen_func = _varlen
    if tuple(map(int, version.split("."))) >= (2, 8, 4):
        module.flash_attn_with_kvcache = _waiting_kvcache
    else:
        module.flash_attn_with_kvcache = _kvcache
    return module


def flash_attn_interface() -> types.ModuleType:
    """The module `flash_attn_interface`."""
    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_with_kvcache = _kvcache_3
    return module


def _varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    assert dropout_p == 0.0 and alibi_slopes is None and not deterministic and not return_attn_probs
    assert k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
    _check_lists(cu_seqlens_q, cu_seqlens_k, size=len(block_table) + 1)
    lens = (cu_seqlens_k[1:] - cu_seqlens_k[:-1]).tolist()
    starts = cu_seqlens_q.tolist()
    assert type(max_seqlen_q) is type(max_seqlen_k) is int and max_seqlen_k >= max(lens)
    return _run(q, k, v, block_table, starts, lens, max_seqlen_q, softmax_scale, causal, window_size, softcap)


def _kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
    cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
):  # fmt: skip
    assert all(x is None for x in (k, v, rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad, alibi_slopes))
    assert not return_softmax_lse and num_splits == 0
    assert k_cache.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
    return _batch(q, k_cache, v_cache, block_table, cache_seqlens, softmax_scale, causal, window_size, softcap)


def _waiting_kvcache(*args, **settings):
    raise AssertionError("from 2.8.4 on this waits for the device, so a decode step must not call it")


def _kvcache_3(
    q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
    max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
    causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
    scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False,
):  # fmt: skip
    unused = (k, v, qv, rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad, cu_seqlens_k_new, rotary_seqlens)
    assert all(x is None for x in (*unused, q_descale, k_descale, v_descale, scheduler_metadata, pack_gqa))
    assert not return_softmax_lse and attention_chunk == num_splits == sm_margin == 0
    if cu_seqlens_q is None:
        return _batch(q, k_cache, v_cache, page_table, cache_seqlens, softmax_scale, causal, window_size, softcap)
    assert type(max_seqlen_q) is int, "max_seqlen_q must be provided if cu_seqlens_q is provided"
    _check_lists(cu_seqlens_q, size=len(page_table) + 1)
    _check_lists(cache_seqlens, size=len(page_table))
    starts, lens = cu_seqlens_q.tolist(), cache_seqlens.tolist()
    return _run(q, k_cache, v_cache, page_table, starts, lens, max_seqlen_q, softmax_scale, causal, window_size, softcap)


def _batch(q, k_cache, v_cache, table, lens, scale, causal, window, softcap):
    """q [batch, tokens, N, H]."""
    batch, tokens, _, _ = q.shape
    _check_lists(lens, size=batch)
    starts = list(range(0, batch * tokens + 1, tokens))
    return _run(
        q.flatten(0, 1), k_cache, v_cache, table, starts, lens.tolist(), tokens, scale, causal, window, softcap
    ).view(q.shape)


def _run(q, k_cache, v_cache, table, starts, lens, max_query, scale, causal, window, softcap):
    total, num_heads, head_dim = q.shape
    num_blocks, page, num_kv_heads, _ = k_cache.shape
    assert q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type"
    assert k_cache.dtype == v_cache.dtype == q.dtype, "query and key must have the same dtype"
    assert q.stride(-1) == k_cache.stride(-1) == v_cache.stride(-1) == 1, "Input tensor must have contiguous last dimension"
    assert k_cache.shape == v_cache.shape == (num_blocks, page, num_kv_heads, head_dim)
    assert head_dim <= 256 and head_dim % 8 == 0 and num_heads % num_kv_heads == 0
    assert table.dtype == torch.int32 and table.stride(-1) == 1 and table.shape[0] == len(lens) > 0
    assert type(scale) is float and type(softcap) is float and causal is True
    assert starts[-1] == total and max_query >= max(b - a for a, b in zip(starts, starts[1:]))
    left, right = window
    assert left == -1 == right or left >= 0 == right
    out = torch.empty(q.shape, dtype=q.dtype)
    for row, (start, end, length) in enumerate(zip(starts, starts[1:], lens)):
        if end > start:
            assert end - start <= length <= table.shape[1] * page
            pages = table[row, : -(-length // page)]
            out[start:end] = attend(
                q[start:end], k_cache, v_cache, pages, length, scale=scale, left=left, softcap=softcap
            )
    return out


def _check_lists(*lists, size):
    for values in lists:
        assert values.dtype == torch.int32 and values.is_contiguous() and values.shape == (size,)
