"""The gated MLP (Shazeer 2020): down(act(gate(x)) * up(x)).

Shape letters: T tokens, D model, I intermediate size on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from hpcinfer.comm.communicator import Communicator
from hpcinfer.config.model import ModelConfig
from hpcinfer.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from hpcinfer.layers.segments import Segments

# Every one maps 0 to 0, so that padded columns contribute nothing.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class GatedMlp:
    """Gate and up projections as one matmul, down projection with the layer's second all-reduce.

    Args:
        config: sizes, biases, activation.
        layer: number of the layer in the whole model; names its transfers.
        tp: communicator of the tensor-parallel axis.
    """

    def __init__(
        self, config: ModelConfig, layer: int, *, tp: Communicator, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.gate_up = MergedColumnParallelLinear(
            config.hidden_size, (config.intermediate_size, config.intermediate_size), bias=config.mlp_bias,
            tp=tp, dtype=dtype, device=device,
        )
        self.down = RowParallelLinear(
            config.intermediate_size, config.hidden_size, bias=config.mlp_bias,
            tp=tp, dtype=dtype, device=device, label=f"layer {layer} down",
        )
        self._activate = ACTIVATIONS[config.hidden_act]

    def forward(self, x: torch.Tensor) -> Segments:
        """x [T, D] -> [T, D]. Collective: one all-reduce over tp."""
        gate, up = self.gate_up.forward(x).split(self.gate_up.shard_sizes, dim=-1)
        y = yield from self.down.forward(self._activate(gate).mul_(up))
        return y
