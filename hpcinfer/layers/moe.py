"""A mixture of experts in place of a layer's MLP.

Where the experts lie decides who computes what (`parallel.axes.StageAxes.ep`):
- ep = 1: every tp rank has a slice of all experts; partial sums are reduced over tp.
- ep = tp: every tp rank has some whole experts and computes them for all tokens; the same reduction adds up.
- ep = sp * tp: tokens travel (`parallel.expert`). Each tp rank sends its share of its lane's tokens, gets back their
  outputs, and the stream puts the shares together again.

Shape letters: T tokens, P of them on this rank, S in this rank's share, D model, E experts of the model, k experts of a
token.
"""

from __future__ import annotations

import torch

from hpcinfer.attention.metadata import AttentionMetadata
from hpcinfer.config.model import ModelConfig
from hpcinfer.kernels.routing import count_experts
from hpcinfer.layers.experts import Experts
from hpcinfer.layers.router import Router
from hpcinfer.parallel.axes import StageAxes
from hpcinfer.parallel.expert import ExpertDispatch
from hpcinfer.parallel.segments import Segments
from hpcinfer.parallel.tensor import TokenStream, pad_rows, shard_rows


class MoeMlp:
    """Router and experts of one layer.

    Args:
        config: sizes, router, activation.
        layer: number of the layer in the whole model; names its transfers.
        axes, stream: of the stage.
        dtype, device: of the weights.
        rounded_weights: the router's weights are rounded to `dtype` before they multiply outputs.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        *,
        axes: StageAxes,
        stream: TokenStream,
        dtype: torch.dtype,
        device: torch.device,
        rounded_weights: bool = True,
    ) -> None:
        tp, ep = axes.tp, axes.ep
        self.router = Router(config, rounded=rounded_weights, dtype=dtype, device=device)
        is_split = ep.size == 1
        self.experts = Experts(
            config, ranks=ep.size, rank=ep.rank, slices=tp.size if is_split else 1,
            slice_rank=tp.rank if is_split else 0, dtype=dtype, device=device,
        )
        self.load = torch.zeros(config.num_experts, dtype=torch.int64, device=device)
        """int64 [E]: tokens sent to each expert since the start, padding not counted. The sum over all ranks counts each token
        once."""
        self._tp = tp
        self._stream = stream
        self._layer = layer
        self._dispatch = None
        if axes.ep_spans_lanes:
            self._dispatch = ExpertDispatch(
                ep, num_experts=config.num_experts, label=f"layer {layer} experts"
            )

    def forward(self, x: torch.Tensor, metadata: AttentionMetadata) -> Segments:
        """x [P, D] -> [P, D]. Collective: see the module."""
        if self._dispatch is not None:
            y = yield from self._forward_shares(x, metadata)
            return y
        x = yield from self._stream.gather(x, metadata.num_tokens, label=f"layer {self._layer} mlp")
        ids, weights = self.router.forward(x, metadata.valid)
        if self._tp.rank == 0:
            count_experts(self.load, ids)
        y = self.experts.forward(x, ids, weights)
        y = yield from self._stream.reduce(y, label=f"layer {self._layer} experts")
        return y

    def _forward_shares(self, x: torch.Tensor, metadata: AttentionMetadata) -> Segments:
        """x [P, D] -> [P, D], by way of the tokens' experts on all ranks of all lanes."""
        share = self._stream.shard(x, metadata.num_tokens)
        rows = share_rows(metadata.lane_tokens, self._tp.size)
        own = share[: rows[self._dispatch.ep.rank]]
        first = self._tp.rank * shard_rows(metadata.num_tokens, self._tp.size)
        valid = None if metadata.valid is None else metadata.valid[first : first + len(own)]
        ids, weights = self.router.forward(own, valid)
        count_experts(self.load, ids)
        y = yield from self._dispatch.forward(
            own, ids, weights, self.experts.forward, rows=rows, gathered=not metadata.is_prefill
        )
        y = yield from self._stream.unshard(
            pad_rows(y, share.shape[0]), metadata.num_tokens, label=f"layer {self._layer} shares"
        )
        return y


def share_rows(lane_tokens: tuple[int, ...], tp: int) -> tuple[int, ...]:
    """Tokens in the share of every ep rank (lane * tp + tp rank), padding not counted."""
    return tuple(
        min(max(num_tokens - rank * shard_rows(num_tokens, tp), 0), shard_rows(num_tokens, tp))
        for num_tokens in lane_tokens for rank in range(tp)
    )
