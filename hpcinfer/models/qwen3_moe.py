"""Qwen3-MoE: Qwen3's layers, most of them with a mixture of experts, the others with a dense MLP."""

from __future__ import annotations

from functools import partial

from hpcinfer.config.model import ModelConfig
from hpcinfer.layers.mlp import GatedMlp
from hpcinfer.layers.moe import MoeMlp
from hpcinfer.models.base import WeightLoader
from hpcinfer.models.llama import LlamaStage, linear_shapes


class Qwen3MoeStage(LlamaStage):
    """A stage of a Qwen3-MoE model. Arguments as of StageModel."""

    def make_mlp(self, layer: int) -> MoeMlp | GatedMlp:
        if not self.config.moe_layers[layer]:
            return super().make_mlp(layer)
        return MoeMlp(
            self.config, layer, axes=self.axes, stream=self.stream, dtype=self.dtype, device=self.device
        )

    def mlp_weights(self, mlp: MoeMlp | GatedMlp) -> dict[str, WeightLoader]:
        if isinstance(mlp, GatedMlp):
            return super().mlp_weights(mlp)
        loaders: dict[str, WeightLoader] = {"mlp.gate.weight": mlp.router.load_weight}
        for expert in mlp.experts.held:
            prefix = f"mlp.experts.{expert}"
            loaders[f"{prefix}.gate_proj.weight"] = partial(mlp.experts.load_gate, expert=expert)
            loaders[f"{prefix}.up_proj.weight"] = partial(mlp.experts.load_up, expert=expert)
            loaders[f"{prefix}.down_proj.weight"] = partial(mlp.experts.load_down, expert=expert)
        return loaders

    @classmethod
    def mlp_shapes(cls, config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
        if not config.moe_layers[layer]:
            return super().mlp_shapes(config, layer)
        hidden, size = config.hidden_size, config.expert_size
        shapes = linear_shapes("mlp.gate", config.num_experts, hidden, bias=False)
        for expert in range(config.num_experts):
            prefix = f"mlp.experts.{expert}"
            shapes.update(linear_shapes(f"{prefix}.gate_proj", size, hidden, bias=False))
            shapes.update(linear_shapes(f"{prefix}.up_proj", size, hidden, bias=False))
            shapes.update(linear_shapes(f"{prefix}.down_proj", hidden, size, bias=False))
        return shapes
