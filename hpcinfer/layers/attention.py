"""The attention layer: projections, rotary embedding, pages, output projection.

Shape letters: T tokens, D model, N query heads and K key/value heads of this rank, H head dim.
"""

from __future__ import annotations

import torch

from hpcinfer.attention.base import AttentionBackend, AttentionSpec
from hpcinfer.attention.metadata import AttentionMetadata
from hpcinfer.comm.communicator import Communicator
from hpcinfer.config.model import ModelConfig
from hpcinfer.layers.linear import QkvParallelLinear, RowParallelLinear
from hpcinfer.layers.norm import QkNorm
from hpcinfer.layers.rotary import rotate
from hpcinfer.layers.segments import Segments


class Attention:
    """Grouped-query attention of one layer with this rank's heads. Its only communication is the all-reduce of `o`.

    Args:
        config: sizes, biases, qk-norm.
        layer: number of the layer in the whole model; fixes its sliding window and names its transfers.
        tp: communicator of the tensor-parallel axis.
        backend: computes softmax attention over pages.
    """

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
        self.qkv = QkvParallelLinear(
            config.hidden_size, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
            bias=config.qkv_bias, tp=tp, dtype=dtype, device=device,
        )
        self.o = RowParallelLinear(
            config.num_heads * config.head_dim, config.hidden_size, bias=config.o_bias,
            tp=tp, dtype=dtype, device=device, label=f"layer {layer} o",
        )
        num_heads, num_kv_heads = self.qkv.num_heads, self.qkv.num_kv_heads
        self.qk_norm = (
            QkNorm(num_heads, num_kv_heads, config.head_dim, eps=config.rms_norm_eps, dtype=dtype, device=device)
            if config.qk_norm else None
        )
        self.spec = AttentionSpec(
            num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=config.head_dim,
            scale=config.head_dim**-0.5, sliding_window=config.sliding_window[layer],
        )
        self._backend = backend

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        metadata: AttentionMetadata,
        cache: tuple[torch.Tensor, torch.Tensor],
    ) -> Segments:
        """x [T, D], cos and sin [T, 1, H/2], the layer's pages -> [T, D]. Collective: one all-reduce over tp."""
        num_heads, num_rotated = self.spec.num_heads, self.spec.num_heads + self.spec.num_kv_heads
        qkv = self.qkv.forward(x)
        qk, v = qkv[:, :num_rotated], qkv[:, num_rotated:]
        if self.qk_norm is not None:
            qk = self.qk_norm.forward(qk)
        qk = rotate(qk, *rotary)
        q, k = qk[:, :num_heads], qk[:, num_heads:]
        self._backend.write(k, v, *cache, metadata)
        attended = self._backend.forward(q, k, v, *cache, metadata, self.spec)
        y = yield from self.o.forward(attended.flatten(1))
        return y
