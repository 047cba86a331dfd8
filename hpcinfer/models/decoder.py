"""The pre-norm decoder that all families are built from: embedding, layers of attention and MLP, norm, head.

    hidden += attention(norm(hidden));  hidden += mlp(norm(hidden))

A family says which norms and MLPs its layers have and what its tensors are called in checkpoints.

Shape letters: T tokens, P of them on this rank, D model, V vocabulary, H head dim, S rows whose logits are wanted.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Mapping
from typing import Protocol, TypeVar

import numpy as np
import torch

from hpcinfer.attention.base import AttentionBackend
from hpcinfer.attention.metadata import AttentionMetadata
from hpcinfer.comm.communicator import Handle
from hpcinfer.config.model import ModelConfig
from hpcinfer.kernels.rotary import RotaryTables
from hpcinfer.kvcache.pool import KvPool
from hpcinfer.layers.attention import Attention
from hpcinfer.layers.embedding import ParallelHead, VocabParallelEmbedding
from hpcinfer.layers.moe import MoeMlp
from hpcinfer.layers.rotary import Rotary
from hpcinfer.models.base import Readout, StageInputs, StageModel, WeightLoader
from hpcinfer.parallel.axes import StageAxes
from hpcinfer.parallel.segments import Segments


class Norm(Protocol):
    """RmsNorm or LayerNorm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D] -> the same shape."""

    def forward_sum(self, hidden: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden and y [P, D] -> the norm of their sum, and their sum; new tensors."""

    def weights(self) -> dict[str, WeightLoader]:
        """Its tensors, by their last name."""


class Mlp(Protocol):
    """What follows attention in a layer: an MLP or a mixture of experts."""

    def forward(self, x: torch.Tensor, metadata: AttentionMetadata) -> Segments:
        """x [P, D] -> [P, D]."""


class DecoderLayer:
    """Attention and MLP, each on the normalised residual stream, with two reductions in all."""

    def __init__(self, *, attention_norm: Norm, attention: Attention, mlp_norm: Norm, mlp: Mlp) -> None:
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def forward(
        self,
        hidden: torch.Tensor,
        y: torch.Tensor | None,
        rotary: RotaryTables,
        metadata: AttentionMetadata,
        cache: tuple[torch.Tensor, torch.Tensor],
    ) -> Generator[Handle, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """The residual stream is in two parts, before the layer and after it: the norm that follows adds them in the same pass.

        Args:
            hidden: [P, D].
            y: [P, D], the output of the layer before; None where that is in `hidden`.

        Returns:
            hidden and y of the next layer.
        """
        # Sums make new tensors: `hidden` may be a received buffer, and a result of an all-reduce a communicator's own.
        if y is None:
            normed = self.attention_norm.forward(hidden)
        else:
            normed, hidden = self.attention_norm.forward_sum(hidden, y)
        y = yield from self.attention.forward(normed, rotary, metadata, cache)
        normed, hidden = self.mlp_norm.forward_sum(hidden, y)
        y = yield from self.mlp.forward(normed, metadata)
        return hidden, y


class DecoderStage(StageModel):
    """A stage of such a model. Arguments as of StageModel."""

    embedding_name = "model.embed_tokens.weight"
    norm_name = "model.norm"
    head_name = "lm_head.weight"
    layers_name = "model.layers"

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
        super().__init__(config, layers=layers, axes=axes, backend=backend, dtype=dtype, device=device)
        self.embedding = self.norm = self.head = None
        if self.is_first:
            self.embedding = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, stream=self.stream, dtype=dtype, device=device
            )
        self.layers = [self.make_layer(layer) for layer in layers]
        if self.is_last:
            self.norm = self.make_norm()
            self.head = ParallelHead(
                config.vocab_size, config.hidden_size, tied=self.embedding if config.tie_word_embeddings else None,
                tp=axes.tp, dtype=dtype, device=device,
            )
        self.rotary = Rotary(config.rope, config.head_dim, dtype=dtype, device=device) if config.rope else None

    def make_layer(self, layer: int) -> DecoderLayer:
        """The layer with number `layer` in the whole model."""
        return DecoderLayer(
            attention_norm=self.make_norm(),
            attention=Attention(
                self.config, layer, axes=self.axes, stream=self.stream, backend=self.backend,
                dtype=self.dtype, device=self.device,
            ),
            mlp_norm=self.make_norm(),
            mlp=self.make_mlp(layer),
        )

    @abstractmethod
    def make_mlp(self, layer: int) -> Mlp:
        """The MLP, or the mixture of experts, of a layer."""

    @abstractmethod
    def make_norm(self) -> Norm:
        """A norm over D as the family has them."""

    @abstractmethod
    def layer_weights(self, layer: DecoderLayer) -> dict[str, WeightLoader]:
        """The layer's tensors, named without the layer's prefix."""

    def embed(self, inputs: StageInputs) -> Segments:
        """Token ids -> hidden [P, D]."""
        hidden = yield from self.embedding.forward(inputs.token_ids)
        return hidden

    def forward(self, inputs: StageInputs, kv: KvPool) -> Segments:
        metadata = inputs.metadata
        hidden = inputs.hidden
        if self.embedding is not None:
            hidden = yield from self.embed(inputs)
        hidden = yield from self.run_layers(hidden, metadata, kv, len(self.layers))
        if self.head is None:
            return hidden
        if inputs.readout is None:
            drawn = yield from self.stream.select(hidden, inputs.sample_indices, metadata.num_tokens, label="head")
        else:
            hidden = yield from self.stream.gather(hidden, metadata.num_tokens, label="head")
            yield from self._read(hidden, inputs.readout)
            drawn = hidden[inputs.sample_indices]
        logits = yield from self.head.forward(self.norm.forward(drawn))
        return logits

    def _read(self, hidden: torch.Tensor, readout: Readout) -> Generator[Handle, torch.Tensor, None]:
        """From hidden [T, D] of the last layer."""
        if len(readout.rows):
            normed = self.norm.forward(hidden[readout.rows])
            readout.logprobs = yield from self.head.logprobs(normed, readout.targets, readout.num_top)
        if readout.pools:
            # In float64, so that the sum does not depend on how a prompt was cut into chunks.
            readout.pooled = torch.stack(
                [self.norm.forward(hidden[first:stop]).double().sum(dim=0) for first, stop in readout.pools]
            )

    def run_layers(
        self, hidden: torch.Tensor, metadata: AttentionMetadata, kv: KvPool, num_layers: int
    ) -> Segments:
        rotary = self.rotary.tables(metadata.positions) if self.rotary else None
        y = None
        for index, layer in enumerate(self.layers[:num_layers]):
            hidden, y = yield from layer.forward(hidden, y, rotary, metadata, kv.layer(index))
        return hidden if y is None else hidden + y

    def expert_load(self) -> dict[int, np.ndarray]:
        return {number: mlp.load.cpu().numpy() for number, mlp in self._mixtures()}

    def forget_expert_load(self) -> None:
        for _, mlp in self._mixtures():
            mlp.load.zero_()

    def _mixtures(self) -> list[tuple[int, MoeMlp]]:
        numbered = zip(self.layer_range, self.layers, strict=True)
        return [(number, layer.mlp) for number, layer in numbered if isinstance(layer.mlp, MoeMlp)]

    def weights(self) -> dict[str, WeightLoader]:
        loaders: dict[str, WeightLoader] = {}
        if self.embedding is not None:
            loaders[self.embedding_name] = self.embedding.load_weight
        for number, layer in zip(self.layer_range, self.layers, strict=True):
            loaders.update(prefixed(f"{self.layers_name}.{number}.", self.layer_weights(layer)))
        if self.head is not None:
            loaders.update(prefixed(f"{self.norm_name}.", self.norm.weights()))
            if not self.config.tie_word_embeddings:
                loaders[self.head_name] = self.head.load_weight
            elif self.embedding is None:
                # A tied head on a stage of its own keeps a copy of the embedding.
                loaders[self.embedding_name] = self.head.load_weight
        shapes = self.checkpoint_shapes(self.config)
        return {name: loader for name, loader in loaders.items() if name in shapes}

    @classmethod
    def checkpoint_shapes(cls, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        embedding = (config.vocab_size, config.hidden_size)
        shapes = {cls.embedding_name: embedding, **prefixed(f"{cls.norm_name}.", cls.norm_shapes(config))}
        if not config.tie_word_embeddings:
            shapes[cls.head_name] = embedding
        for layer in range(config.num_layers):
            shapes.update(prefixed(f"{cls.layers_name}.{layer}.", cls.layer_shapes(config, layer)))
        return shapes

    @classmethod
    @abstractmethod
    def layer_shapes(cls, config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
        """Name, without the layer's prefix, and shape of every tensor of a layer."""

    @classmethod
    def norm_shapes(cls, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Name, without the norm's prefix, and shape of the tensors of a norm over D."""
        return {"weight": (config.hidden_size,)}

    @classmethod
    def is_ignored(cls, config: ModelConfig, name: str) -> bool:
        # Old checkpoints keep the rotary frequencies, which the config implies; some tied ones repeat the embedding.
        return name.endswith("rotary_emb.inv_freq") or (name == cls.head_name and config.tie_word_embeddings)


Value = TypeVar("Value")


def prefixed(prefix: str, named: Mapping[str, Value]) -> dict[str, Value]:
    """The same entries with `prefix` before every name."""
    return {prefix + name: value for name, value in named.items()}
