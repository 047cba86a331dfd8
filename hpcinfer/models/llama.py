"""The Llama family in one decoder: Llama 2 and 3, Mistral, Qwen2 and 2.5, Qwen3.

They differ by settings of ModelConfig alone: biases, norms of queries and keys, windows, rope scaling, tied head.

Shape letters: T tokens, D model, V vocabulary, H head dim, S rows whose logits are wanted.
"""

from __future__ import annotations

from functools import partial

import torch

from hpcinfer.attention.base import AttentionBackend
from hpcinfer.attention.metadata import AttentionMetadata
from hpcinfer.comm.communicator import Communicator
from hpcinfer.config.model import ModelConfig
from hpcinfer.kvcache.pool import KvPool
from hpcinfer.layers.attention import Attention
from hpcinfer.layers.embedding import ParallelHead, VocabParallelEmbedding
from hpcinfer.layers.mlp import GatedMlp
from hpcinfer.layers.norm import RmsNorm
from hpcinfer.layers.rotary import Rotary
from hpcinfer.layers.segments import Segments
from hpcinfer.models.base import StageInputs, StageModel, WeightLoader

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class DecoderLayer:
    """Attention and MLP, each on the normalised residual stream, with two all-reduces in all."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        *,
        tp: Communicator,
        backend: AttentionBackend,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.prefix = f"model.layers.{layer}."
        self.attention_norm = RmsNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype, device=device)
        self.attention = Attention(config, layer, tp=tp, backend=backend, dtype=dtype, device=device)
        self.mlp_norm = RmsNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype, device=device)
        self.mlp = GatedMlp(config, layer, tp=tp, dtype=dtype, device=device)

    def forward(
        self,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        metadata: AttentionMetadata,
        cache: tuple[torch.Tensor, torch.Tensor],
    ) -> Segments:
        """hidden [T, D] -> [T, D]."""
        # Sums make new tensors: `hidden` may be a received buffer, and a result of an all-reduce a communicator's own.
        y = yield from self.attention.forward(self.attention_norm.forward(hidden), rotary, metadata, cache)
        hidden = hidden + y
        y = yield from self.mlp.forward(self.mlp_norm.forward(hidden))
        return hidden + y

    def weights(self) -> dict[str, WeightLoader]:
        """Names in the checkpoint, each with what takes its shard."""
        qkv, o, gate_up, down = self.attention.qkv, self.attention.o, self.mlp.gate_up, self.mlp.down
        loaders: dict[str, WeightLoader] = {
            "input_layernorm.weight": self.attention_norm.load_weight,
            "post_attention_layernorm.weight": self.mlp_norm.load_weight,
            "self_attn.o_proj.weight": o.load_weight,
            "self_attn.o_proj.bias": o.load_bias,
            "mlp.down_proj.weight": down.load_weight,
            "mlp.down_proj.bias": down.load_bias,
        }
        for part in ("q", "k", "v"):
            loaders[f"self_attn.{part}_proj.weight"] = partial(qkv.load_weight, part=part)
            loaders[f"self_attn.{part}_proj.bias"] = partial(qkv.load_bias, part=part)
        for part, name in enumerate(("gate", "up")):
            loaders[f"mlp.{name}_proj.weight"] = partial(gate_up.load_weight, part=part)
            loaders[f"mlp.{name}_proj.bias"] = partial(gate_up.load_bias, part=part)
        if self.attention.qk_norm is not None:
            loaders["self_attn.q_norm.weight"] = self.attention.qk_norm.load_q
            loaders["self_attn.k_norm.weight"] = self.attention.qk_norm.load_k
        return {self.prefix + name: loader for name, loader in loaders.items()}


class LlamaStage(StageModel):
    """A stage of a Llama-family model. Arguments as of StageModel."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        layers: range,
        tp: Communicator,
        backend: AttentionBackend,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(config, layers=layers, tp=tp, backend=backend, dtype=dtype, device=device)
        place = {"tp": tp, "dtype": dtype, "device": device}
        self.embedding = (
            VocabParallelEmbedding(config.vocab_size, config.hidden_size, **place) if self.is_first else None
        )
        self.layers = [DecoderLayer(config, i, backend=backend, **place) for i in layers]
        self.norm = self.head = None
        if self.is_last:
            self.norm = RmsNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype, device=device)
            tied = self.embedding if config.tie_word_embeddings else None
            self.head = ParallelHead(config.vocab_size, config.hidden_size, tied=tied, **place)
        self.rotary = Rotary(config.rope, config.head_dim, dtype=dtype, device=device)

    def forward(self, inputs: StageInputs, kv: KvPool) -> Segments:
        if self.embedding is not None:
            hidden = yield from self.embedding.forward(inputs.token_ids)
        else:
            hidden = inputs.hidden
        rotary = self.rotary.tables(inputs.metadata.positions)
        for index, layer in enumerate(self.layers):
            hidden = yield from layer.forward(hidden, rotary, inputs.metadata, kv.layer(index))
        if self.head is None:
            return hidden
        drawn = self.norm.forward(hidden.index_select(0, inputs.sample_indices))
        logits = yield from self.head.forward(drawn)
        return logits

    def weights(self) -> dict[str, WeightLoader]:
        loaders: dict[str, WeightLoader] = {}
        if self.embedding is not None:
            loaders[EMBEDDING] = self.embedding.load_weight
        for layer in self.layers:
            loaders.update(layer.weights())
        if self.head is not None:
            loaders[FINAL_NORM] = self.norm.load_weight
            if not self.config.tie_word_embeddings:
                loaders[HEAD] = self.head.load_weight
            elif self.embedding is None:
                # A tied head on a stage of its own keeps a copy of the embedding.
                loaders[EMBEDDING] = self.head.load_weight
        shapes = self.checkpoint_shapes(self.config)
        return {name: loader for name, loader in loaders.items() if name in shapes}

    @classmethod
    def checkpoint_shapes(cls, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        embedding = (config.vocab_size, config.hidden_size)
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: embedding, FINAL_NORM: (config.hidden_size,)}
        if not config.tie_word_embeddings:
            shapes[HEAD] = embedding
        for layer in range(config.num_layers):
            for name, shape in _layer_shapes(config).items():
                shapes[f"model.layers.{layer}.{name}"] = shape
        return shapes

    @classmethod
    def is_ignored(cls, config: ModelConfig, name: str) -> bool:
        # Old checkpoints keep the rotary frequencies, which the config implies; some tied ones repeat the embedding.
        return name.endswith("rotary_emb.inv_freq") or (name == HEAD and config.tie_word_embeddings)


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, mlp = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    matrices = {
        "self_attn.q_proj": (q, hidden, config.qkv_bias),
        "self_attn.k_proj": (kv, hidden, config.qkv_bias),
        "self_attn.v_proj": (kv, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, q, config.o_bias),
        "mlp.gate_proj": (mlp, hidden, config.mlp_bias),
        "mlp.up_proj": (mlp, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, mlp, config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns, bias) in matrices.items():
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)
    shapes["input_layernorm.weight"] = shapes["post_attention_layernorm.weight"] = (hidden,)
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes
