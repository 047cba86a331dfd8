"""The attention layer: projections, rotary embedding where the model has it, pages, output projection.

Shape letters: T tokens, P of them on this rank, D model, N query heads and K key/value heads of this rank, H head dim,
X shared tokens of all lanes together.
"""

from __future__ import annotations

from collections.abc import Generator

import torch

from hpcinfer.attention.base import AttentionBackend, AttentionSpec
from hpcinfer.attention.metadata import AttentionMetadata
from hpcinfer.comm.communicator import FinishedHandle, Handle
from hpcinfer.config.model import ModelConfig
from hpcinfer.kernels.rotary import RotaryTables, norm_rotate, norm_rotate_write
from hpcinfer.layers.linear import QkvParallelLinear, RowParallelLinear
from hpcinfer.layers.norm import QkNorm
from hpcinfer.layers.shard import check_shape
from hpcinfer.parallel.axes import StageAxes
from hpcinfer.parallel.segments import Segments
from hpcinfer.parallel.tensor import TokenStream, pad_rows


class Attention:
    """Grouped-query attention of one layer with this rank's heads. Its communication is the reduction of `o` and, where a
    prompt's tokens are spread over lanes, one all-gather of their keys and values.

    Args:
        config: sizes, biases, qk-norm, sinks.
        layer: number of the layer in the whole model; fixes its sliding window and names its transfers.
        axes, stream: of the stage.
        backend: computes softmax attention over pages.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        *,
        axes: StageAxes,
        stream: TokenStream,
        backend: AttentionBackend,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.qkv = QkvParallelLinear(
            config.hidden_size, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
            bias=config.qkv_bias, tp=axes.tp, dtype=dtype, device=device,
        )
        self.o = RowParallelLinear(
            config.num_heads * config.head_dim, config.hidden_size, bias=config.o_bias,
            stream=stream, dtype=dtype, device=device, label=f"layer {layer} o",
        )
        num_heads, num_kv_heads = self.qkv.num_heads, self.qkv.num_kv_heads
        self.qk_norm = (
            QkNorm(num_heads, num_kv_heads, config.head_dim, eps=config.rms_norm_eps, dtype=dtype, device=device)
            if config.qk_norm else None
        )
        self.sinks = torch.zeros(num_heads, dtype=dtype, device=device) if config.attention_sinks else None
        self._first_head = axes.tp.rank * num_heads
        self.spec = AttentionSpec(
            num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=config.head_dim,
            scale=config.head_dim**-0.5, sliding_window=config.sliding_window[layer],
            sinks=self.sinks,
        )
        self._backend = backend
        self._sp = axes.sp
        self._stream = stream
        self._layer = layer

    def load_sinks(self, full: torch.Tensor) -> None:
        """Take this rank's heads from the sinks of all query heads."""
        num_heads = self.spec.num_heads
        check_shape(full, (num_heads * self._stream.tp.size,), "attention sinks")
        self.sinks.copy_(full[self._first_head : self._first_head + num_heads])

    def forward(
        self,
        x: torch.Tensor,
        rotary: RotaryTables,
        metadata: AttentionMetadata,
        cache: tuple[torch.Tensor, torch.Tensor],
    ) -> Segments:
        """x [P, D], the rotary tables, the layer's pages -> [P, D]. Collective: see the class."""
        x = yield from self._stream.gather(x, metadata.num_tokens, label=f"layer {self._layer} qkv")
        if metadata.shared is None:
            q, k, v = norm_rotate_write(
                self.qkv.forward(x), self.spec.num_heads, self.qk_norm and self.qk_norm.of_qk, rotary,
                cache, metadata.slot_mapping, self._backend.write,
            )
            if self._sp.size > 1 and metadata.is_prefill:
                # Takes the turn of the gather: the other part of the step may have one, and must not be overtaken.
                yield FinishedHandle(v, f"layer {self._layer} kv")
        else:
            q, k, v = yield from self._project_shared(x, rotary, metadata, cache)
        attended = self._backend.forward(q, k, v, *cache, metadata, self.spec)
        y = yield from self.o.forward(attended.flatten(1))
        return y

    def _project_shared(
        self,
        x: torch.Tensor,
        rotary: RotaryTables,
        metadata: AttentionMetadata,
        cache: tuple[torch.Tensor, torch.Tensor],
    ) -> Generator[Handle, torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """The same, where the first tokens' keys and values go into the pages of all lanes.

        Keys and values are made first: while they travel, the queries are made and the tokens of this lane alone written.
        """
        shared, num_kv_heads = metadata.shared, self.spec.num_kv_heads
        kv = self.qkv.forward_kv(x)
        k, v = kv[:, :num_kv_heads], kv[:, num_kv_heads:]
        k = norm_rotate(k, self.qk_norm and self.qk_norm.of_k, rotary)
        mine = pad_rows(torch.cat((k[: shared.own], v[: shared.own]), dim=1), max(shared.lens))
        gathering = self._sp.all_gather(mine, label=f"layer {self._layer} kv")
        q = norm_rotate(self.qkv.forward_q(x), self.qk_norm and self.qk_norm.of_q, rotary)
        self._backend.write(k[shared.own :], v[shared.own :], *cache, metadata.slot_mapping[shared.own :])
        gathered = yield gathering
        everyone = gathered[shared.rows]  # [X, 2K, H]
        self._backend.write(everyone[:, :num_kv_heads], everyone[:, num_kv_heads:], *cache, shared.slots)
        return q, k, v
