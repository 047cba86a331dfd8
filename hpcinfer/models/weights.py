"""From the files of a checkpoint to this rank's shards.

Headers (`Checkpoint`) are read by one rank and handed to the others. Data are read once in the whole world, whatever the
number of ranks (`models.weight_stream`), and sliced on each rank's device by the layers' own loaders.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping

import torch

from hpcinfer.comm.bootstrap import World, split
from hpcinfer.errors import CheckpointError
from hpcinfer.models.base import StageModel, WeightLoader
from hpcinfer.models.checkpoint import Checkpoint, check_tensors
from hpcinfer.models.extents import EXTENT_BYTES, Extent, Piece, plan_extents
from hpcinfer.models.safetensors_file import TensorEntry
from hpcinfer.models.weight_stream import WeightStream
from hpcinfer.parallel.agree import together

_NO_DEADLINE = float("inf")


@dataclasses.dataclass(kw_only=True, slots=True)
class LoadFigures:
    """How far loading is on one rank."""

    total_bytes: int = 0
    """Of the checkpoint, that the whole model needs."""
    done_bytes: int = 0
    """Those of them that have come to this rank."""
    read_bytes: int = 0
    """Bytes that this rank got from the file system; over the ranks of the world they add up to `total_bytes`."""
    seconds: float = 0.0
    """Since loading began."""


def load_stage(
    model: StageModel,
    checkpoint: Checkpoint,
    world: World,
    *,
    progress: Callable[[LoadFigures], None] | None = None,
    extent_bytes: int = EXTENT_BYTES,
) -> LoadFigures:
    """Fill this rank's shards from the checkpoint, cast to the model's dtype. Collective over the world.

    The first rank of each node reads; the nodes take turns, an extent each. While it lasts a rank needs, beside the
    weights that it keeps, two extents and the stage's largest tensor on its device (twice where its bytes are not
    aligned), and what loaders hold back (`PackedLoader`); a rank that reads needs two extents of host memory too. All of
    it is free again before pages are allocated. There is no deadline: a file system may be slow.

    Args:
        checkpoint: the same on all ranks.
        world: the ranks among which each byte is read once, all replicas together.
        progress: called after each extent.
        extent_bytes: what is read and broadcast at once.

    Raises:
        CheckpointError: see `check_tensors`; a dtype that is not supported; a file that cannot be read any more, or has
            become shorter. Raised on all ranks.
    """
    began_s = time.monotonic()
    patient = dataclasses.replace(world, deadline_s=_NO_DEADLINE)
    needed = together(world.channel, lambda: _needed_entries(model, checkpoint), deadline_s=_NO_DEADLINE)
    readers = [rank for rank, local_rank in enumerate(world.channel.all_gather(world.local_rank)) if local_rank == 0]
    communicator = split(patient, range(world.size), "weights")
    extents = plan_extents(needed, extent_bytes)
    stream = WeightStream(extents, communicator, readers)
    filler = StageFiller(model.weights(), needed)
    figures = LoadFigures(total_bytes=sum(extent.num_bytes for extent in extents))

    def take(extent: Extent, data: torch.Tensor) -> None:
        filler.take(extent, data)
        figures.done_bytes += extent.num_bytes
        figures.read_bytes = stream.bytes_read
        figures.seconds = time.monotonic() - began_s
        if progress is not None:
            progress(figures)

    error = stream.run(take)
    communicator.close()
    together(world.channel, lambda: _raise(error), deadline_s=_NO_DEADLINE)
    filler.check_complete()
    return figures


class StageFiller:
    """Puts the tensors of a stage together from extents and gives each to its loader.

    Args:
        loaders: name -> what takes the tensor.
        entries: name -> its place, of these and of any others.
    """

    def __init__(self, loaders: Mapping[str, WeightLoader], entries: Mapping[str, TensorEntry]) -> None:
        self._loaders = dict(loaders)
        self._entries = entries
        self._partial: torch.Tensor | None = None

    def take(self, extent: Extent, data: torch.Tensor) -> None:
        """Take the next extent, `data` uint8 [its bytes] on any device. Keeps nothing of `data`.

        Raises:
            CheckpointError: a layer refuses its tensor.
        """
        for piece in extent.pieces:
            if piece.name in self._loaders:
                entry = self._entries[piece.name]
                whole = self._whole(piece, entry, data[piece.offset : piece.offset + piece.num_bytes])
                if whole is not None:
                    self._loaders.pop(piece.name)(_as_tensor(whole, entry))

    def check_complete(self) -> None:
        """Fail where a tensor has not come."""
        assert not self._loaders, f"no extent had {sorted(self._loaders)}"

    def _whole(self, piece: Piece, entry: TensorEntry, data: torch.Tensor) -> torch.Tensor | None:
        """All bytes of the piece's tensor, None while some are still to come. A tensor's pieces follow each other, so that
        one tensor at most is waiting."""
        if piece.num_bytes == entry.num_bytes:
            return data
        if self._partial is None:
            self._partial = torch.empty(entry.num_bytes, dtype=torch.uint8, device=data.device)
        end = piece.tensor_offset + piece.num_bytes
        self._partial[piece.tensor_offset : end].copy_(data)
        if end < entry.num_bytes:
            return None
        whole, self._partial = self._partial, None
        return whole


def _as_tensor(data: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    """The bytes of a tensor as what they mean; a view, where they are aligned as its dtype wants."""
    dtype = entry.torch_dtype
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()  # old files need not align their data
    return data.view(dtype).view(entry.shape)


def _needed_entries(model: StageModel, checkpoint: Checkpoint) -> dict[str, TensorEntry]:
    """The tensors that any rank needs, checked: those of the whole model. The same on all ranks."""
    check_tensors(checkpoint, type(model), model.config)
    checkpoint = checkpoint.named_for(type(model))
    needed = {name: checkpoint.entry(name) for name in model.checkpoint_shapes(model.config)}
    for entry in needed.values():
        _ = entry.torch_dtype
    return needed


def _raise(error: CheckpointError | None) -> None:
    if error is not None:
        raise error
