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
    """Of queries, and of the output."""
    head_dim: int
    num_heads: int
    """Query heads of this rank."""
    num_kv_heads: int
    """Key/value heads of this rank."""
    block_size: int = 0
    """Tokens in a page. 0: what the backend prefers."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability, None without a GPU."""
    cuda_version: tuple[int, int] | None = None
    """Of the CUDA that torch was built with, None in a build without it."""
    hip: bool = False
    """The GPU is an AMD one: torch calls its devices `cuda` too."""
    packages: frozenset[str] = frozenset()
    """Which of `registry.PACKAGES` can be found here."""
    kv_dtype: torch.dtype | None = None
    """Of the pages. None: as the queries."""
    latent_kv: bool = False
    """A token has one latent vector for all heads in place of keys and values (MLA)."""
    sliding_window: bool = False
    softcap: bool = False
    sinks: bool = False


class AttentionBackend(ABC):
    """Softmax attention over pages. Holds no weights and nothing of a sequence; one object serves all layers."""

    name: str
    """Its name in settings, upper case."""
    capturable: bool = False
    """`forward` of a microbatch of decodes alone (every entry one token) depends on device tensors and static shapes, never waits
    for the device, and takes the host's numbers for upper bounds: it can be captured in a CUDA graph. Padding entries of a captured
    step have a sequence length of 1 and page 0, which no sequence owns. The metadata's scratch must be empty when capture begins."""

    @abstractmethod
    def refuses(self, query: AttentionQuery) -> str | None:
        """The first condition of `query` that the backend does not meet, in words; None when it meets all. Imports nothing."""

    def preferred_block_size(self, query: AttentionQuery) -> int:
        """Tokens in a page where the job leaves it open."""
        return 16

    def prepare(self, query: AttentionQuery) -> None:
        """Import what `forward` needs. Called once, when the backend has been chosen. Raises ImportError."""

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
    """The part of `refuses` that all backends share: what none has, and which features beyond plain attention this one has."""
    if query.hip:
        return (
            "AMD/ROCm not supported: GPUs exchange tensors by NCCL through CuPy's CUDA build, and no kernel here has been run on an AMD GPU"
        )
    if query.kv_dtype is not None and query.kv_dtype != query.dtype:
        kind = "FP8 K/V" if query.kv_dtype.itemsize == 1 else f"K/V in {dtype_name(query.kv_dtype)}"
        return f"{kind} not supported: pages hold the model's dtype, and no kernel here applies a scale to what it reads"
    if query.latent_kv:
        return "MLA not supported: a page holds a key and a value of every key/value head, not one latent vector for all"
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


def refuse_device(
    query: AttentionQuery, *, capability: tuple[int, int], dtypes: tuple[torch.dtype, ...]
) -> str | None:
    """The part of `refuses` that backends for GPUs share: an NVIDIA GPU of this compute capability or a higher one, and a dtype."""
    if query.device_type != "cuda" or query.capability is None:
        return "needs an NVIDIA GPU"
    if query.capability < capability:
        return f"needs compute capability {version(capability)} or higher, this GPU has {version(query.capability)}"
    if query.dtype not in dtypes:
        return f"{dtype_name(query.dtype)} not supported (only {', '.join(map(dtype_name, dtypes))})"
    return None


def version(numbers: tuple[int, ...]) -> str:
    """(9, 0) -> "9.0"."""
    return ".".join(map(str, numbers))


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")
