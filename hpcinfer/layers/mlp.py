"""The MLP of a dense layer: gated (Shazeer 2020), down(act(gate(x)) * up(x)), or plain, down(act(up(x))).

Shape letters: T tokens, P of them on this rank, D model, I intermediate size on this rank.
"""

from __future__ import annotations

import torch

from hpcinfer.attention.metadata import AttentionMetadata
from hpcinfer.config.model import ModelConfig
from hpcinfer.kernels.gate import ACTIVATIONS, Gate, gate_up_product
from hpcinfer.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from hpcinfer.parallel.segments import Segments
from hpcinfer.parallel.tensor import TokenStream

class GatedMlp:
    """Gate and up projections as one matmul, down projection with the layer's second reduction.

    Args:
        config: sizes, biases, activation.
        layer: number of the layer in the whole model; names its transfers.
        stream: of the stage.
    """

    def __init__(
        self, config: ModelConfig, layer: int, *, stream: TokenStream, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.gate_up = MergedColumnParallelLinear(
            config.hidden_size, (config.intermediate_size, config.intermediate_size), bias=config.mlp_bias,
            tp=stream.tp, dtype=dtype, device=device,
        )
        self.down = RowParallelLinear(
            config.intermediate_size, config.hidden_size, bias=config.mlp_bias,
            stream=stream, dtype=dtype, device=device, label=f"layer {layer} down",
        )
        self._gate = Gate(activation=config.hidden_act)
        self._stream = stream
        self._label = f"layer {layer} mlp"

    def forward(self, x: torch.Tensor, metadata: AttentionMetadata) -> Segments:
        """x [P, D] -> [P, D]. Collective: one reduction over tp."""
        x = yield from self._stream.gather(x, metadata.num_tokens, label=self._label)
        y = yield from self.down.forward(gate_up_product(self.gate_up.forward(x), self._gate))
        return y


class Mlp:
    """Up projection, activation, down projection with the layer's second reduction.

    Args:
        config: sizes, biases, activation.
        layer: number of the layer in the whole model; names its transfers.
        stream: of the stage.
    """

    def __init__(
        self, config: ModelConfig, layer: int, *, stream: TokenStream, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.up = ColumnParallelLinear(
            config.hidden_size, config.intermediate_size, bias=config.mlp_bias, tp=stream.tp, dtype=dtype, device=device
        )
        self.down = RowParallelLinear(
            config.intermediate_size, config.hidden_size, bias=config.mlp_bias,
            stream=stream, dtype=dtype, device=device, label=f"layer {layer} down",
        )
        self._activate = ACTIVATIONS[config.hidden_act]
        self._stream = stream
        self._label = f"layer {layer} mlp"

    def forward(self, x: torch.Tensor, metadata: AttentionMetadata) -> Segments:
        """x [P, D] -> [P, D]. Collective: one reduction over tp."""
        x = yield from self._stream.gather(x, metadata.num_tokens, label=self._label)
        y = yield from self.down.forward(self._activate(self.up.forward(x)))
        return y
