"""Random weights of given dimensions, for benchmarks: the same model in every layout, without a checkpoint."""

from __future__ import annotations

import zlib

import torch

from hpcinfer.models.base import StageModel


# 2**-7: numbers of up to 6 then have a standard deviation of about 0.02.
_MXFP4_SCALE = 120


def fill_random(model: StageModel, seed: int = 0) -> None:
    """Fill this rank's shards of a random model.

    Matrices are normal with standard deviation in_features ** -0.5, so that activations and logits keep a sane size at
    any width; norms are 1 and biases 0. Every tensor is drawn whole from a key of its name and `seed` and then sliced,
    so that tensor-parallel ranks and stages agree; one whole tensor at a time is held in the model's dtype.
    """
    shapes = model.checkpoint_shapes(model.config)
    generator = torch.Generator(device=model.device)
    for name, loader in model.weights().items():
        packed = name.endswith(("_blocks", "_scales"))
        full = torch.empty(shapes[name], dtype=torch.uint8 if packed else model.dtype, device=model.device)
        if name.endswith("_scales"):
            full.fill_(_MXFP4_SCALE)
        elif packed:
            generator.manual_seed(zlib.crc32(name.encode(), seed & 0xFFFFFFFF))
            full.random_(0, 256, generator=generator)
        elif name.endswith((".bias", "_bias")):
            full.zero_()
        elif full.dim() == 1:
            full.fill_(1.0)
        else:
            generator.manual_seed(zlib.crc32(name.encode(), seed & 0xFFFFFFFF))
            full.normal_(0.0, full.shape[-1] ** -0.5, generator=generator)
        loader(full)
