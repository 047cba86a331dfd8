"""The interface of an attention backend: softmax attention over paged keys and values.

Shape letters: T tokens in the microbatch, N query heads and K key/value heads of this rank, H head dim.

In each layer the keys and values of the whole microbatch are written into the pages first (`write`), then attention
reads what it needs (`forward`): an entry's query at absolute position i of its sequence sees positions j <= i of the same
sequence and, with a sliding window w, only those with i - w < j, which is how transformers defines the window. Nothing
here communicates: under tensor parallelism each rank attends with its own heads.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod

import torch

from hpcinfer.attention.metadata import AttentionMetadata
from hpcinfer.kvcache.layout import KvLayout


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec:
    """What one layer's attention computes."""

    num_heads: int
    """N: query heads of this rank."""
    num_kv_heads: int
    """K: key/value heads of this rank; query head n uses key/value head n // (N / K)."""
    head_dim: int
    """H."""
    scale: float
    """Multiplies the scores; usually head_dim ** -0.5."""
    sliding_window: int | None = None
    """None: all earlier tokens are seen."""
    softcap: float | None = None
    """Scores become softcap * tanh(scores / softcap) (Gemma 2)."""
    sinks: torch.Tensor | None = None
    """[N]: a learned score per head that takes part in the softmax and has no value (gpt-oss)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttentionQuery:
    """What a model and a machine ask of a backend, when one is chosen."""

    device_type: str
    """`cpu` or `cuda`."""
    dtype: torch.dtype
    head_dim: int
    num_heads: int
    num_kv_heads: int
    block_size: int
    capability: tuple[int, int] | None = None
    """CUDA compute capability, None without a GPU."""
    sliding_window: bool = False
    softcap: bool = False
    sinks: bool = False


class AttentionBackend(ABC):
    """Softmax attention over pages. Holds no weights and nothing of a sequence; one object serves all layers."""

    name: str
    """Its name in settings, upper case."""
    capturable: bool = False
    """`forward` of a microbatch of decodes depends on device tensors and shapes alone, host numbers being upper bounds, and never
    waits for the device: it can be captured in a CUDA graph."""

    @abstractmethod
    def refuses(self, query: AttentionQuery) -> str | None:
        """The first condition of `query` that the backend does not meet, in words; None when it meets all."""

    @abstractmethod
    def kv_layout(self, block_size: int, num_kv_heads: int, head_dim: int) -> KvLayout:
        """The page layout that `write` and `forward` use."""

    def write(
        self, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Put k and v ([T, K, H], any strides) into the pages at `slots`, int64 [T]: block * S + offset.

        For pages [block, token, head, dim]; a backend with another layout has its own.
        """
        k_cache.flatten(0, 1).index_copy_(0, slots, k)
        v_cache.flatten(0, 1).index_copy_(0, slots, v)

    @abstractmethod
    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """Attend. `write` has been called with the same k and v.

        Args:
            q: [T, N, H], any strides with a contiguous last dim.
            k, v: [T, K, H], what `write` put into the pages: a backend may read them instead of the pages.
            k_cache, v_cache: the pages, in this backend's layout. Slots that no sequence of the microbatch uses may
                hold anything, NaN included, and must not change the result.

        Returns:
            [T, N, H] contiguous, q's dtype.
        """


def refuse_features(
    query: AttentionQuery, *, window: bool = False, softcap: bool = False, sinks: bool = False
) -> str | None:
    """The part of `refuses` that all backends share: which features beyond plain attention a backend has."""
    if query.num_heads % query.num_kv_heads:
        return f"{query.num_heads} query heads over {query.num_kv_heads} key/value heads"
    for name, wanted, has in (
        ("sliding window", query.sliding_window, window),
        ("softcap", query.softcap, softcap),
        ("attention sinks", query.sinks, sinks),
    ):
        if wanted and not has:
            return f"{name} not supported"
    return None
