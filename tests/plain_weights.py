"""What loading should come to: a stage filled by means of the safetensors package, and how two stages are compared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from hpcinfer.models.base import StageModel


def fill_plainly(stage: StageModel, folder: Path) -> None:
    """Give every loader its whole tensor."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors.update(load_file(path))
    for name, loader in stage.weights().items():
        loader(tensors[name])


def tensors_of(part: object, name: str = "stage") -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of the layers of a stage."""
    if isinstance(part, torch.Tensor):
        yield name, part
    elif isinstance(part, list):
        for index, each in enumerate(part):
            yield from tensors_of(each, f"{name}.{index}")
    elif type(part).__module__.startswith(("hpcinfer.models", "hpcinfer.layers")):
        for key, each in vars(part).items():
            yield from tensors_of(each, f"{name}.{key}")


def assert_same_weights(stage: StageModel, wanted: StageModel) -> None:
    """Bit for bit, on whatever devices."""
    pairs = list(zip(tensors_of(stage), tensors_of(wanted), strict=True))
    assert len(pairs) >= 8, "a layer has six, the ends at least two more"
    for (name, tensor), (_, expected) in pairs:
        assert torch.equal(tensor.cpu(), expected.cpu()), name
