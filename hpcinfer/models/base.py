"""What a model is to the engine: one stage of it on this rank, with this rank's shards.

Shape letters: T tokens in the microbatch, P of them on this rank, D model, V vocabulary, S rows whose logits are wanted.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch

from hpcinfer.attention.base import AttentionBackend
from hpcinfer.attention.metadata import AttentionMetadata, build_metadata, to_device
from hpcinfer.batch import MicroBatch, Reading
from hpcinfer.config.model import ModelConfig
from hpcinfer.errors import ConfigError
from hpcinfer.kvcache.layout import KvLayout
from hpcinfer.kvcache.pool import KvPool
from hpcinfer.parallel.axes import StageAxes
from hpcinfer.parallel.segments import Segments
from hpcinfer.parallel.tensor import token_stream

WeightLoader: TypeAlias = Callable[[torch.Tensor], None]
"""Takes the full tensor of the checkpoint (any float dtype, on CPU or device) and keeps a copy of this rank's
shard: the tensor's memory is used again after the call."""


class Readout:
    """What a last stage reads from its final hidden states beside logits, and, when it has, what it read.

    Args:
        reading: of the microbatch. Q sums are wanted in it, and the log-probabilities of R tokens.
        device: of the stage.
    """

    def __init__(self, reading: Reading, device: torch.device) -> None:
        rows = np.flatnonzero(reading.targets >= 0)
        self.rows = to_device(torch.from_numpy(rows), device)
        """int64 [R]: tokens after which the log-probability of another one is wanted."""
        self.targets = to_device(torch.from_numpy(reading.targets[rows]), device)
        """int64 [R]: those others."""
        self.num_top = reading.num_top
        self.pools = reading.pools
        self.logprobs: torch.Tensor | None = None
        """int32 [R, 1 + 2 num_top], see `kernels.logprobs.join_shards`."""
        self.pooled: torch.Tensor | None = None
        """float64 [Q, D]: sums of hidden states after the last norm."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StageInputs:
    """What a stage computes one microbatch from."""

    metadata: AttentionMetadata
    sample_indices: torch.Tensor
    """int64 [S]: the tokens of the microbatch after which a new token is drawn; only the last stage reads it."""
    token_ids: torch.Tensor | None = None
    """int64 [T]; for the first stage."""
    hidden: torch.Tensor | None = None
    """[P, D] in the model's dtype, from the stage before; for every other stage."""
    readout: Readout | None = None
    """What the last stage is to read beside logits."""

    @classmethod
    def from_microbatch(
        cls,
        microbatch: MicroBatch,
        *,
        block_size: int,
        device: torch.device,
        lane: int = 0,
        hidden: torch.Tensor | None = None,
        drawn: torch.Tensor | None = None,
        readout: Readout | None = None,
    ) -> StageInputs:
        """Make the tensors of a microbatch on a rank of `lane`.

        Args:
            hidden: given on every stage but the first.
            drawn: int64, the tokens that this lane drew in the step before; read where token ids are negative.
            readout: of the microbatch's `reading`, on the last stage.
        """
        ends = np.cumsum(microbatch.query_lens, dtype=np.int64) - 1
        draws = np.asarray(microbatch.samples, bool) & (np.asarray(microbatch.query_lens) > 0)
        token_ids = None
        if hidden is None:
            token_ids = to_device(torch.from_numpy(np.asarray(microbatch.token_ids, np.int64)), device)
            if (microbatch.token_ids < 0).any():
                token_ids = with_drawn(token_ids, drawn)
        return cls(
            metadata=build_metadata(microbatch, block_size, device, lane=lane),
            sample_indices=to_device(torch.from_numpy(ends[draws]), device),
            token_ids=token_ids,
            hidden=hidden,
            readout=readout,
        )


def with_drawn(token_ids: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """token_ids int64 [T], in which -1 - i stands for drawn[i] -> the ids. Where a draw gave no token, any id will do."""
    return torch.where(token_ids < 0, drawn[(-1 - token_ids).clamp_(min=0)], token_ids).clamp_(min=0)


class StageModel(ABC):
    """Some consecutive layers of a model on this rank; the first stage also embeds, the last also makes logits.

    Args:
        config: the whole model.
        layers: the layers of this stage, out of range(config.num_layers).
        axes: communicators of the stage.
        backend: attention backend for all layers.
        dtype: of weights, activations and pages.
        device: of weights.

    Raises:
        ConfigError: the layers or the heads do not fit.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        layers: range,
        axes: StageAxes,
        backend: AttentionBackend,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if layers.step != 1 or not 0 <= layers.start < layers.stop <= config.num_layers:
            raise ConfigError(
                f"a stage of layers {layers.start} to {layers.stop} (exclusive)",
                found=f"the model has {config.num_layers} layers",
                fix="each stage needs at least one layer of the model",
            )
        config.check_tp(axes.tp.size)
        self.config = config
        self.layer_range = layers
        self.axes = axes
        self.stream = token_stream(axes)
        self.backend = backend
        self.dtype = dtype
        self.device = device
        self.is_first = layers.start == 0
        self.is_last = layers.stop == config.num_layers

    @abstractmethod
    def forward(self, inputs: StageInputs, kv: KvPool) -> Segments:
        """Compute the stage's layers for one microbatch; a generator, see `parallel.segments`.

        Returns (as the generator's value):
            hidden [P, D] in the model's dtype, or on the last stage float32 logits [S, V], the same on all tp ranks.
        """

    @abstractmethod
    def run_layers(
        self, hidden: torch.Tensor, metadata: AttentionMetadata, kv: KvPool, num_layers: int
    ) -> Segments:
        """The first `num_layers` layers of the stage alone: hidden [P, D] -> [P, D]. For measuring them."""

    @abstractmethod
    def weights(self) -> dict[str, WeightLoader]:
        """Tensors of the checkpoint that this stage needs, each with what takes it."""

    @classmethod
    @abstractmethod
    def checkpoint_shapes(cls, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that a checkpoint of the whole model must have."""

    @classmethod
    def canonical_name(cls, name: str) -> str:
        """What this class calls the tensor that a checkpoint calls `name`."""
        return name

    @classmethod
    def is_ignored(cls, config: ModelConfig, name: str) -> bool:
        """True for a tensor that checkpoints of this family may have and that nothing needs."""
        return False

    def expert_load(self) -> dict[int, np.ndarray]:
        """Layer -> int64 [experts]: tokens that this rank has counted for each expert of this stage's mixtures. The sum over the
        ranks of a stage counts each token once."""
        return {}

    def forget_expert_load(self) -> None:
        """Count from 0."""

    def kv_layout(self, block_size: int) -> KvLayout:
        """The pages of one layer on this rank, as the backend wants them."""
        heads = max(self.config.num_kv_heads // self.axes.tp.size, 1)
        return self.backend.kv_layout(block_size, heads, self.config.head_dim)

    def allocate_kv(self, *, num_blocks: int, block_size: int) -> KvPool:
        """Pages for all layers of this stage."""
        return KvPool(
            self.kv_layout(block_size), num_layers=len(self.layer_range), num_blocks=num_blocks,
            dtype=self.dtype, device=self.device,
        )
