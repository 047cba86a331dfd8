"""How a dim of a weight is split over ranks: even parts, the last ones padded with zeros or empty."""

from __future__ import annotations

import torch

from hpcinfer.errors import CheckpointError


def part_size(size: int, num_ranks: int) -> int:
    """Rows that each rank stores: ceil(size / num_ranks), padding included."""
    return -(-size // num_ranks)


def part_range(size: int, num_ranks: int, rank: int) -> tuple[int, int]:
    """First and one past the last real row of `rank`; equal when the rank has padding only."""
    part = part_size(size, num_ranks)
    return min(rank * part, size), min((rank + 1) * part, size)


def copy_shard(shard: torch.Tensor, full: torch.Tensor, dim: int, start: int, end: int) -> None:
    """Fill `shard` with rows start to end of dim `dim` of `full`, cast to its dtype; what is left over becomes zero."""
    count = end - start
    shard.narrow(dim, 0, count).copy_(full.narrow(dim, start, count))
    shard.narrow(dim, count, shard.shape[dim] - count).zero_()


def check_shape(full: torch.Tensor, expected: tuple[int, ...], what: str) -> None:
    """Raise CheckpointError unless a whole tensor has the shape that the layer was made for."""
    if tuple(full.shape) != expected:
        raise CheckpointError(f"{what} has a wrong shape", found=f"{tuple(full.shape)}, expected {expected}")
