"""Mixtral (Jiang et al. 2024): Llama's layers with a mixture of experts in each."""

from __future__ import annotations

from functools import partial

from hpcinfer.config.model import ModelConfig
from hpcinfer.layers.moe import MoeMlp
from hpcinfer.models.base import WeightLoader
from hpcinfer.models.llama import LlamaStage


class MixtralStage(LlamaStage):
    """A stage of a Mixtral model. Arguments as of StageModel."""

    def make_mlp(self, layer: int) -> MoeMlp:
        # transformers leaves this family's routing weights in float32.
        return MoeMlp(
            self.config, layer, axes=self.axes, stream=self.stream, dtype=self.dtype, device=self.device,
            rounded_weights=False,
        )

    def mlp_weights(self, mlp: MoeMlp) -> dict[str, WeightLoader]:
        loaders: dict[str, WeightLoader] = {"block_sparse_moe.gate.weight": mlp.router.load_weight}
        for expert in mlp.experts.held:
            prefix = f"block_sparse_moe.experts.{expert}"
            loaders[f"{prefix}.w1.weight"] = partial(mlp.experts.load_gate, expert=expert)
            loaders[f"{prefix}.w2.weight"] = partial(mlp.experts.load_down, expert=expert)
            loaders[f"{prefix}.w3.weight"] = partial(mlp.experts.load_up, expert=expert)
        return loaders

    @classmethod
    def mlp_shapes(cls, config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
        hidden, size = config.hidden_size, config.expert_size
        shapes = {"block_sparse_moe.gate.weight": (config.num_experts, hidden)}
        for expert in range(config.num_experts):
            prefix = f"block_sparse_moe.experts.{expert}"
            shapes[f"{prefix}.w1.weight"] = shapes[f"{prefix}.w3.weight"] = (size, hidden)
            shapes[f"{prefix}.w2.weight"] = (hidden, size)
        return shapes
