"""A stand-in for flashinfer 0.6.13: the documented arguments of its wrappers, their checks and those of the kernels behind them
(decode.py, prefill.py, attention/_core.py, csrc/batch_*.cu), and float32 torch."""

from __future__ import annotations

import types

import torch

from tests.contract.paged_reference import attend


def flashinfer() -> types.ModuleType:
    """The module."""
    module = types.ModuleType("flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper = _Decode
    module.BatchPrefillWithPagedKVCacheWrapper = _Prefill
    module.BatchAttentionWithAttentionSinkWrapper = _Sinks
    return module


class _Wrapper:
    """What all three share: a plan that lives in the wrapper until the next one."""

    def __init__(self, workspace, layout):
        assert workspace.dtype == torch.uint8 and layout == "NHD"
        # It must be 0 at first; nothing here writes to it.
        assert not workspace[: 2**12].any()

    def _set_plan(
        self, starts, indptr, indices, last_page_len, heads, kv_heads, head_dim, page_size, window_left, softcap, scale, q_type, kv_type
    ):  # fmt: skip
        lists = (starts, indptr, indices, last_page_len)
        assert all(x.dtype == torch.int32 and x.device.type == "cpu" and x.dim() == 1 for x in lists)
        assert len(starts) == len(indptr) == len(last_page_len) + 1 > 1 and indptr[-1] == len(indices)
        assert ((last_page_len >= 1) & (last_page_len <= page_size)).all()
        assert head_dim in (64, 128, 256) and heads % kv_heads == 0 and q_type == kv_type
        assert q_type in (torch.float16, torch.bfloat16)
        # Copies, as on a device: what the caller does with its own afterwards must not matter.
        self._lists = [x.clone() for x in lists]
        self._sizes = (heads, kv_heads, head_dim, page_size)
        self._window_left, self._softcap, self._scale, self._dtype = window_left, softcap or 0.0, scale, q_type

    def _attend(self, q, paged_kv_cache, out, sinks=None):
        heads, kv_heads, head_dim, page_size = self._sizes
        k_cache, v_cache = paged_kv_cache
        starts, indptr, indices, last = self._lists
        assert q.dtype == k_cache.dtype == v_cache.dtype == out.dtype == self._dtype
        assert q.shape == out.shape == (starts[-1], heads, head_dim) and q.stride(-1) == 1 and out.is_contiguous()
        assert k_cache.shape[1:] == v_cache.shape[1:] == (page_size, kv_heads, head_dim)
        assert k_cache.stride() == v_cache.stride()
        for row in range(len(last)):
            begin, end = starts[row : row + 2].tolist()
            pages = indices[indptr[row] : indptr[row + 1]]
            length = (len(pages) - 1) * page_size + int(last[row])
            assert 0 < end - begin <= length
            out[begin:end] = attend(
                q[begin:end], k_cache, v_cache, pages, length, scale=self._scale, left=self._window_left,
                softcap=self._softcap, sinks=sinks,
            )
        return out


class _Decode(_Wrapper):
    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False,
        paged_kv_indptr_buffer=None, paged_kv_indices_buffer=None, paged_kv_last_page_len_buffer=None, backend="auto", jit_args=None,
    ):  # fmt: skip
        super().__init__(float_workspace_buffer, kv_layout)
        assert not use_cuda_graph and backend == "auto" and jit_args is None
        self._tensor_cores = use_tensor_cores

    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, pos_encoding_mode="NONE",
        window_left=-1, logits_soft_cap=None, q_data_type="float16", kv_data_type=None, o_data_type=None, data_type=None,
        sm_scale=None, rope_scale=None, rope_theta=None, non_blocking=True, block_tables=None, seq_lens=None,
        fixed_split_size=None, disable_split_kv=False, q_len_per_req=1,
    ):  # fmt: skip
        assert pos_encoding_mode == "NONE" and o_data_type is None and data_type is None and sm_scale is not None
        assert self._tensor_cores or num_qo_heads // num_kv_heads in (1, 2, 3, 4, 8), "Unsupported group_size"
        starts = torch.arange(len(indptr), dtype=torch.int32)
        self._set_plan(
            starts, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, window_left,
            logits_soft_cap, sm_scale, q_data_type, kv_data_type,
        )

    def run(
        self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None, lse=None, return_lse=False,
        enable_pdl=None, window_left=None, sinks=None, q_len_per_req=None, skip_softmax_threshold_scale_factor=None,
        kv_cache_sf=None,
    ):  # fmt: skip
        assert not args and sinks is None, "sinks reach only the trtllm-gen kernels"
        return self._attend(q, paged_kv_cache, out)


class _Prefill(_Wrapper):
    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, qo_indptr_buf=None, paged_kv_indptr_buf=None,
        paged_kv_indices_buf=None, paged_kv_last_page_len_buf=None, custom_mask_buf=None, mask_indptr_buf=None,
        backend="auto", jit_args=None, jit_kwargs=None,
    ):  # fmt: skip
        super().__init__(float_workspace_buffer, kv_layout)
        assert not use_cuda_graph and backend == "auto" and jit_args is None

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim_qk,
        page_size, head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False, pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None, rope_scale=None, rope_theta=None,
        q_data_type="float16", kv_data_type=None, o_data_type=None, non_blocking=True, prefix_len_ptr=None,
        token_pos_in_items_ptr=None, token_pos_in_items_len=0, max_item_len_ptr=None, seq_lens=None, seq_lens_q=None,
        block_tables=None, max_token_per_sequence=None, max_sequence_kv=None, fixed_split_size=None, disable_split_kv=False,
    ):  # fmt: skip
        assert causal and custom_mask is None and pos_encoding_mode == "NONE" and sm_scale is not None
        self._set_plan(
            qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim_qk,
            page_size, window_left, logits_soft_cap, sm_scale, q_data_type, kv_data_type,
        )

    def run(
        self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None, lse=None, return_lse=False,
        enable_pdl=None, window_left=None, sinks=None, kv_cache_sf=None, skip_softmax_threshold_scale_factor=None,
    ):  # fmt: skip
        assert not args and sinks is None, "sinks reach only the trtllm-gen kernels"
        return self._attend(q, paged_kv_cache, out)


class _Sinks(_Prefill):
    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, qo_indptr_buf=None, paged_kv_indptr_buf=None,
        paged_kv_indices_buf=None, paged_kv_last_page_len_buf=None, custom_mask_buf=None, mask_indptr_buf=None,
        backend="auto", pos_encoding_mode="NONE", use_fp16_qk_reduction=False, q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16, head_dim_qk=128, head_dim_vo=128, window_left=-1,
    ):  # fmt: skip
        super().__init__(float_workspace_buffer, kv_layout)
        self._compiled_for = (q_data_type, kv_data_type, head_dim_qk, head_dim_vo, window_left >= 0)

    def run(self, q, paged_kv_cache, *args, out=None):
        sinks, scale = args  # the additional tensor and the additional scalar of its kernel
        head_dim = self._sizes[2]
        assert self._compiled_for == (self._dtype, self._dtype, head_dim, head_dim, self._window_left >= 0)
        assert sinks.dtype == torch.float32 and sinks.shape == (self._sizes[0],) and scale == self._scale
        assert self._softcap == 0, "the kernel with sinks has no softcap"
        return self._attend(q, paged_kv_cache, out, sinks)
