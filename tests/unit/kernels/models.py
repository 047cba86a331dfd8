"""Sizes of published models, and a step of a few of their layers."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from hpcinfer.attention.base import AttentionBackend
from hpcinfer.attention.metadata import build_metadata
from hpcinfer.batch import MicroBatch
from hpcinfer.comm.local import LocalCommunicator
from hpcinfer.config.model import ModelConfig
from hpcinfer.kvcache.layout import KvLayout
from hpcinfer.models.base import StageInputs, StageModel
from hpcinfer.models.registry import model_class
from hpcinfer.parallel.axes import StageAxes
from hpcinfer.parallel.segments import run_to_end

BLOCK_SIZE = 16


def model(family: str, vocab: int, hidden: int, inner: int, heads: int, kv_heads: int, head_dim: int, **more) -> ModelConfig:
    return ModelConfig(
        family=family, vocab_size=vocab, hidden_size=hidden, intermediate_size=inner, num_layers=2, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=head_dim, max_position_embeddings=32768, **more,
    )


_GPT_OSS = model(
    "GptOssForCausalLM", 201088, 2880, 2880, 64, 8, 64, attention_sinks=True, qkv_bias=True, o_bias=True, num_experts=32,
    experts_per_token=4, expert_size=2880, router="topk_softmax", router_bias=True, expert_bias=True, swiglu_limit=7.0,
    expert_format="mxfp4",
)
MODELS = {
    "Llama-3.1-8B": model("LlamaForCausalLM", 128256, 4096, 14336, 32, 8, 128),
    "Qwen3-0.6B": model("Qwen3ForCausalLM", 151936, 1024, 3072, 16, 8, 128, qk_norm=True, tie_word_embeddings=True),
    "GPT-2": model(
        "GPT2LMHeadModel", 50257, 768, 3072, 12, 12, 64, norm="layer", rope=None, learned_positions=True, gated_mlp=False,
        hidden_act="gelu_tanh", qkv_bias=True, o_bias=True, mlp_bias=True, tie_word_embeddings=True,
    ),
    "Mixtral-8x7B": model(
        "MixtralForCausalLM", 32000, 4096, 14336, 32, 8, 128, num_experts=8, experts_per_token=2, expert_size=14336,
        router="softmax_topk", normalize_topk=True,
    ),
    "Qwen3-30B-A3B": model(
        "Qwen3MoeForCausalLM", 151936, 2048, 6144, 32, 4, 128, qk_norm=True, num_experts=128, experts_per_token=8,
        expert_size=768, router="softmax_topk", normalize_topk=True,
    ),
    "gpt-oss-20b": _GPT_OSS,
    "gpt-oss-20b packed": dataclasses.replace(_GPT_OSS, packed_experts=True),
}


class NoAttention(AttentionBackend):
    """Attention that gives back the queries: what it costs and how it waits is not looked at."""

    name = "NONE"

    def refuses(self, query) -> str | None:
        return None

    def kv_layout(self, block_size: int, num_kv_heads: int, head_dim: int) -> KvLayout:
        return KvLayout(block_size=block_size, num_kv_heads=num_kv_heads, head_dim=head_dim)

    def forward(self, q, k, v, k_cache, v_cache, metadata, spec) -> torch.Tensor:
        return q.contiguous()


def stage(config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> StageModel:
    """The whole (short) model on one rank."""
    axes = StageAxes(tp=LocalCommunicator("tp", device), ep=LocalCommunicator("ep", device))
    return model_class(config)(
        config, layers=range(config.num_layers), axes=axes, backend=NoAttention(), dtype=dtype, device=device
    )


def inputs(lens: list[int], device: torch.device) -> StageInputs:
    """The start of a prompt of each length, or a decode where it is 1."""
    blocks = [-(-length // BLOCK_SIZE) for length in lens]
    tables = np.zeros((len(lens), max(blocks)), np.int32)
    for row, (count, end) in enumerate(zip(blocks, np.cumsum(blocks))):
        tables[row, :count] = np.arange(end - count, end)
    microbatch = MicroBatch(
        tick=0, sequence_ids=tuple(range(len(lens))), token_ids=np.arange(sum(lens)).astype(np.int32) % 1000,
        query_lens=np.array(lens, np.int32), context_lens=np.zeros(len(lens), np.int32), block_tables=tables,
        samples=np.ones(len(lens), bool),
    )
    return StageInputs.from_microbatch(microbatch, block_size=BLOCK_SIZE, device=device)


def step(model: StageModel, lens: list[int]) -> torch.Tensor:
    """Logits of a step with such chunks."""
    needed = sum(-(-length // BLOCK_SIZE) for length in lens)
    kv = model.allocate_kv(num_blocks=needed, block_size=BLOCK_SIZE)
    return run_to_end(model.forward(inputs(lens, model.device), kv))
