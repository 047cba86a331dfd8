"""The Llama family: Llama 2 and 3, Mistral, Qwen2 and 2.5, Qwen3.

They differ by settings of ModelConfig alone: biases, norms of queries and keys, windows, rope scaling, tied head.
"""

from __future__ import annotations

from functools import partial

from hpcinfer.config.model import ModelConfig
from hpcinfer.layers.attention import Attention
from hpcinfer.layers.mlp import GatedMlp
from hpcinfer.layers.norm import RmsNorm
from hpcinfer.models.base import WeightLoader
from hpcinfer.models.decoder import DecoderLayer, DecoderStage, prefixed


class LlamaStage(DecoderStage):
    """A stage of a Llama-family model. Arguments as of StageModel."""

    def make_mlp(self, layer: int) -> GatedMlp:
        return GatedMlp(self.config, layer, stream=self.stream, dtype=self.dtype, device=self.device)

    def make_norm(self) -> RmsNorm:
        return RmsNorm(self.config.hidden_size, eps=self.config.rms_norm_eps, dtype=self.dtype, device=self.device)

    def layer_weights(self, layer: DecoderLayer) -> dict[str, WeightLoader]:
        return {
            "input_layernorm.weight": layer.attention_norm.load_weight,
            "post_attention_layernorm.weight": layer.mlp_norm.load_weight,
            **prefixed("self_attn.", attention_weights(layer.attention)),
            **self.mlp_weights(layer.mlp),
        }

    def mlp_weights(self, mlp: GatedMlp) -> dict[str, WeightLoader]:
        """The tensors of an MLP, named without the layer's prefix."""
        loaders: dict[str, WeightLoader] = {
            "mlp.down_proj.weight": mlp.down.load_weight, "mlp.down_proj.bias": mlp.down.load_bias
        }
        for part, name in enumerate(("gate", "up")):
            loaders[f"mlp.{name}_proj.weight"] = partial(mlp.gate_up.load_weight, part=part)
            loaders[f"mlp.{name}_proj.bias"] = partial(mlp.gate_up.load_bias, part=part)
        return loaders

    @classmethod
    def layer_shapes(cls, config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
        norm = (config.hidden_size,)
        return {
            "input_layernorm.weight": norm,
            "post_attention_layernorm.weight": norm,
            **prefixed("self_attn.", attention_shapes(config)),
            **cls.mlp_shapes(config, layer),
        }

    @classmethod
    def mlp_shapes(cls, config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
        """Name, without the layer's prefix, and shape of the tensors of a layer's MLP."""
        hidden, mlp, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        return {
            **linear_shapes("mlp.gate_proj", mlp, hidden, bias=bias),
            **linear_shapes("mlp.up_proj", mlp, hidden, bias=bias),
            **linear_shapes("mlp.down_proj", hidden, mlp, bias=bias),
        }


def attention_weights(attention: Attention) -> dict[str, WeightLoader]:
    """The tensors of an attention layer by Llama's names; biases and norms that a model does not have are left out later."""
    loaders: dict[str, WeightLoader] = {
        "o_proj.weight": attention.o.load_weight, "o_proj.bias": attention.o.load_bias
    }
    for part in ("q", "k", "v"):
        loaders[f"{part}_proj.weight"] = partial(attention.qkv.load_weight, part=part)
        loaders[f"{part}_proj.bias"] = partial(attention.qkv.load_bias, part=part)
    if attention.qk_norm is not None:
        loaders["q_norm.weight"] = attention.qk_norm.load_q
        loaders["k_norm.weight"] = attention.qk_norm.load_k
    return loaders


def attention_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of an attention layer's tensors by Llama's names."""
    hidden = config.hidden_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        **linear_shapes("q_proj", q, hidden, bias=config.qkv_bias),
        **linear_shapes("k_proj", kv, hidden, bias=config.qkv_bias),
        **linear_shapes("v_proj", kv, hidden, bias=config.qkv_bias),
        **linear_shapes("o_proj", hidden, q, bias=config.o_bias),
    }
    if config.qk_norm:
        shapes["q_norm.weight"] = shapes["k_norm.weight"] = (config.head_dim,)
    return shapes


def linear_shapes(name: str, rows: int, columns: int, *, bias: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of a linear layer's tensors."""
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, columns)}
    if bias:
        shapes[f"{name}.bias"] = (rows,)
    return shapes
