"""gpt-oss (OpenAI 2025): attention with sinks, sliding and full layers in turn, a mixture of experts in each layer.

Its checkpoints keep all experts of a layer in one tensor, with gate and up interleaved: row 2i of the two together is
gate's row i, row 2i + 1 up's. Plain tensors are [in, out]; MXFP4 ones are [out, in] in blocks of 32 values along `in`.

Shape letters: D model, E experts, I intermediate size of an expert.
"""

from __future__ import annotations

from functools import partial

import torch

from hpcinfer.config.model import ModelConfig
from hpcinfer.errors import CheckpointError
from hpcinfer.kernels.mxfp4 import BLOCK_BYTES, BLOCK_VALUES, unpack
from hpcinfer.layers.experts import Experts
from hpcinfer.layers.moe import MoeMlp
from hpcinfer.layers.norm import WideRmsNorm
from hpcinfer.models.base import WeightLoader
from hpcinfer.models.decoder import DecoderLayer
from hpcinfer.models.llama import LlamaStage, linear_shapes


class GptOssStage(LlamaStage):
    """A stage of a gpt-oss model. Arguments as of StageModel."""

    def make_norm(self) -> WideRmsNorm:
        return WideRmsNorm(self.config.hidden_size, eps=self.config.rms_norm_eps, dtype=self.dtype, device=self.device)

    def make_mlp(self, layer: int) -> MoeMlp:
        return MoeMlp(
            self.config, layer, axes=self.axes, stream=self.stream, dtype=self.dtype, device=self.device
        )

    def layer_weights(self, layer: DecoderLayer) -> dict[str, WeightLoader]:
        return {**super().layer_weights(layer), "self_attn.sinks": layer.attention.load_sinks}

    def mlp_weights(self, mlp: MoeMlp) -> dict[str, WeightLoader]:
        experts = mlp.experts
        loaders: dict[str, WeightLoader] = {
            "mlp.router.weight": mlp.router.load_weight,
            "mlp.router.bias": mlp.router.load_bias,
            "mlp.experts.gate_up_proj": partial(_load_gate_up, experts),
            "mlp.experts.gate_up_proj_bias": partial(_load_gate_up_bias, experts),
            "mlp.experts.down_proj": partial(_load_down, experts),
            "mlp.experts.down_proj_bias": partial(_load_down_bias, experts),
        }
        for part in ("gate_up", "down"):
            loader = PackedLoader(experts, part)
            loaders[f"mlp.experts.{part}_proj_blocks"] = loader.load_blocks
            loaders[f"mlp.experts.{part}_proj_scales"] = loader.load_scales
        return loaders

    @classmethod
    def layer_shapes(cls, config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
        return {**super().layer_shapes(config, layer), "self_attn.sinks": (config.num_heads,)}

    @classmethod
    def mlp_shapes(cls, config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
        num, hidden, size = config.num_experts, config.hidden_size, config.expert_size
        shapes = {
            **linear_shapes("mlp.router", num, hidden, bias=True),
            "mlp.experts.gate_up_proj_bias": (num, 2 * size),
            "mlp.experts.down_proj_bias": (num, hidden),
        }
        for name, rows, columns in (("gate_up_proj", 2 * size, hidden), ("down_proj", hidden, size)):
            if config.expert_format == "mxfp4":
                groups = columns // BLOCK_VALUES
                shapes[f"mlp.experts.{name}_blocks"] = (num, rows, groups, BLOCK_BYTES)
                shapes[f"mlp.experts.{name}_scales"] = (num, rows, groups)
            else:
                shapes[f"mlp.experts.{name}"] = (num, columns, rows)
        return shapes


class PackedLoader:
    """Takes the blocks and the scales of one projection, in any order, and fills the experts when it has both.

    Args:
        experts: of one layer.
        part: "gate_up" or "down".
    """

    def __init__(self, experts: Experts, part: str) -> None:
        self._experts = experts
        self._part = part
        self._waiting: dict[str, torch.Tensor] = {}

    def load_blocks(self, full: torch.Tensor) -> None:
        """uint8 [E, rows, columns / 32, 16]."""
        self._take("blocks", full)

    def load_scales(self, full: torch.Tensor) -> None:
        """uint8 [E, rows, columns / 32]."""
        self._take("scales", full)

    def _take(self, kind: str, full: torch.Tensor) -> None:
        if full.dtype != torch.uint8:
            raise CheckpointError(f"{kind} of packed experts have a wrong dtype", found=f"{full.dtype}, expected uint8")
        experts = self._experts
        mine = full[experts.first : experts.first + experts.num_local]
        if not self._waiting:
            # The caller may use its tensor again before the other one comes.
            self._waiting[kind] = mine.clone()
            return
        self._waiting[kind] = mine
        blocks, scales = self._waiting["blocks"], self._waiting["scales"]
        for expert in experts.held:
            self._fill(blocks[expert - experts.first], scales[expert - experts.first], expert)
        self._waiting.clear()

    def _fill(self, blocks: torch.Tensor, scales: torch.Tensor, expert: int) -> None:
        experts = self._experts
        if experts.packed is not None:
            if self._part == "gate_up":
                blocks, scales = (torch.cat((t[0::2], t[1::2])) for t in (blocks, scales))
            experts.load_packed(self._part, blocks, scales, expert)
            return
        whole = unpack(blocks, scales, experts.dtype)
        if self._part == "gate_up":
            experts.load_gate(whole[0::2], expert)
            experts.load_up(whole[1::2], expert)
        else:
            experts.load_down(whole, expert)


def _load_gate_up(experts: Experts, full: torch.Tensor) -> None:
    """full [E, D, 2I]."""
    for expert in experts.held:
        rows = full[expert].t()
        experts.load_gate(rows[0::2], expert)
        experts.load_up(rows[1::2], expert)


def _load_gate_up_bias(experts: Experts, full: torch.Tensor) -> None:
    """full [E, 2I]."""
    for expert in experts.held:
        experts.load_biases(full[expert, 0::2], full[expert, 1::2], expert)


def _load_down(experts: Experts, full: torch.Tensor) -> None:
    """full [E, I, D]."""
    for expert in experts.held:
        experts.load_down(full[expert].t(), expert)


def _load_down_bias(experts: Experts, full: torch.Tensor) -> None:
    """full [E, D]."""
    for expert in experts.held:
        experts.load_down_bias(full[expert], expert)
