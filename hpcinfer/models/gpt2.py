"""GPT-2: LayerNorm, learned positions, an MLP without gate, a bias on every projection.

Its checkpoints differ from other families' in three ways. Projections are stored [in, out]; query, key and value are
one tensor; and all names but the head's may or may not begin with `transformer.`, which is dropped here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch

from hpcinfer.config.model import ModelConfig
from hpcinfer.layers.linear import QkvParallelLinear
from hpcinfer.layers.mlp import Mlp
from hpcinfer.layers.norm import LayerNorm
from hpcinfer.layers.positions import LearnedPositions
from hpcinfer.models.base import StageInputs, WeightLoader
from hpcinfer.models.decoder import DecoderLayer, DecoderStage, prefixed
from hpcinfer.parallel.segments import Segments

# Causal masks that old versions saved.
_MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")


class Gpt2Stage(DecoderStage):
    """A stage of a GPT-2 model. Arguments as of StageModel."""

    embedding_name = "wte.weight"
    positions_name = "wpe.weight"
    norm_name = "ln_f"
    layers_name = "h"

    def __init__(self, config: ModelConfig, **kwargs) -> None:
        super().__init__(config, **kwargs)
        self.positions = None
        if self.is_first:
            self.positions = LearnedPositions(
                config.max_position_embeddings, config.hidden_size,
                tp=self.axes.tp, dtype=self.dtype, device=self.device,
            )

    def embed(self, inputs: StageInputs) -> Segments:
        added = self.positions.forward(inputs.metadata.positions)
        hidden = yield from self.embedding.forward(inputs.token_ids, added)
        return hidden

    def make_mlp(self, layer: int) -> Mlp:
        return Mlp(self.config, layer, stream=self.stream, dtype=self.dtype, device=self.device)

    def make_norm(self) -> LayerNorm:
        return LayerNorm(self.config.hidden_size, eps=self.config.rms_norm_eps, dtype=self.dtype, device=self.device)

    def weights(self) -> dict[str, WeightLoader]:
        loaders = super().weights()
        if self.positions is not None:
            loaders[self.positions_name] = self.positions.load_weight
        return loaders

    def layer_weights(self, layer: DecoderLayer) -> dict[str, WeightLoader]:
        qkv, o, mlp = layer.attention.qkv, layer.attention.o, layer.mlp
        return {
            **prefixed("ln_1.", layer.attention_norm.weights()),
            "attn.c_attn.weight": partial(_load_qkv, qkv.load_weight),
            "attn.c_attn.bias": partial(_load_qkv, qkv.load_bias),
            "attn.c_proj.weight": partial(_load_transposed, o.load_weight),
            "attn.c_proj.bias": o.load_bias,
            **prefixed("ln_2.", layer.mlp_norm.weights()),
            "mlp.c_fc.weight": partial(_load_transposed, mlp.up.load_weight),
            "mlp.c_fc.bias": mlp.up.load_bias,
            "mlp.c_proj.weight": partial(_load_transposed, mlp.down.load_weight),
            "mlp.c_proj.bias": mlp.down.load_bias,
        }

    @classmethod
    def checkpoint_shapes(cls, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        return {
            **super().checkpoint_shapes(config),
            cls.positions_name: (config.max_position_embeddings, config.hidden_size),
        }

    @classmethod
    def layer_shapes(cls, config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
        hidden, inner = config.hidden_size, config.intermediate_size
        return {
            **prefixed("ln_1.", cls.norm_shapes(config)),
            **_projection("attn.c_attn", hidden, 3 * hidden),
            **_projection("attn.c_proj", hidden, hidden),
            **prefixed("ln_2.", cls.norm_shapes(config)),
            **_projection("mlp.c_fc", hidden, inner),
            **_projection("mlp.c_proj", inner, hidden),
        }

    @classmethod
    def norm_shapes(cls, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        return {"weight": (config.hidden_size,), "bias": (config.hidden_size,)}

    @classmethod
    def canonical_name(cls, name: str) -> str:
        return name.removeprefix("transformer.")

    @classmethod
    def is_ignored(cls, config: ModelConfig, name: str) -> bool:
        return _MASK.fullmatch(name) is not None or super().is_ignored(config, name)


def _projection(name: str, size_in: int, size_out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size_in, size_out), f"{name}.bias": (size_out,)}


def _load_transposed(load: WeightLoader, full: torch.Tensor) -> None:
    """full [in, out]."""
    load(full.t())


def _load_qkv(load: Callable[[torch.Tensor, str], None], full: torch.Tensor) -> None:
    """full [D, 3D] or [3D]: the weight or the bias of all three; `load` takes one, [D, D] or [D], and its name."""
    for part, tensor in zip(QkvParallelLinear.PARTS, full.t().chunk(3)):
        load(tensor, part)
