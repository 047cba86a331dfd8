"""Runs on every rank: a checkpoint loaded by a whole world, with every byte that this process reads counted.

usage: loading_rank.py FOLDER RESULTS

FOLDER is changed by the cases that damage it. Each rank leaves RESULTS/<rank>.json: case -> figures.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hpcinfer.attention.naive import NaiveBackend
from hpcinfer.comm.bootstrap import World, start_world
from hpcinfer.config.model import ModelConfig
from hpcinfer.config.parallel import ParallelConfig
from hpcinfer.engine.replica_plan import stage_layers
from hpcinfer.errors import CheckpointError
from hpcinfer.launch.process import die_with_parent
from hpcinfer.launch.report import Place, run_as_rank
from hpcinfer.models.base import StageModel
from hpcinfer.models.checkpoint import Checkpoint
from hpcinfer.models.registry import model_class
from hpcinfer.models.weights import load_stage
from hpcinfer.parallel.agree import agree_or_raise
from hpcinfer.parallel.groups import build_groups
from hpcinfer.parallel.mesh import Mesh
from tests.plain_weights import assert_same_weights, fill_plainly

LAYOUTS = {"tp2 x pp2": {"tp": 2, "pp": 2}, "dp2": {"tp": 2}, "dp4": {}}
EXTENT_BYTES = 100_003
preadv = os.preadv


def make_stage(world: World, folder: Path, layout: dict[str, int]) -> StageModel:
    mesh = Mesh.of(world.size, **layout, rank=world.rank)
    config = ModelConfig.from_folder(folder)
    layers = stage_layers(config, ParallelConfig(**layout))[mesh.stage]
    return model_class(config)(
        config, layers=layers, axes=build_groups(world, mesh).axes, backend=NaiveBackend(), dtype=torch.float32,
        device=torch.device("cpu"),
    )


def characters_read() -> int:
    """Bytes that this process has got from read calls so far, from the page cache too (Linux: rchar)."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def load_case(world: World, folder: Path, layout: dict[str, int]) -> dict:
    stage, wanted = make_stage(world, folder, layout), make_stage(world, folder, layout)
    counted = []

    def counting(descriptor: int, buffers: list, offset: int) -> int:
        counted.append(preadv(descriptor, buffers, offset))
        return counted[-1]

    os.preadv = counting
    before = characters_read()
    checkpoint = agree_or_raise(world.channel, lambda: Checkpoint(folder))
    figures = load_stage(stage, checkpoint, world, extent_bytes=EXTENT_BYTES)
    read = characters_read() - before
    os.preadv = preadv
    fill_plainly(wanted, folder)
    assert_same_weights(stage, wanted)
    return {
        "is_reader": world.local_rank == 0, "num_nodes": world.num_nodes, "characters_read": read,
        "preadv_bytes": sum(counted), **dataclasses.asdict(figures),
    }


def failing_case(world: World, folder: Path, damage: Callable[[StageModel], None]) -> dict:
    """Loading after the headers were read and something was damaged: what this rank raised, and when."""
    stage = make_stage(world, folder, LAYOUTS["tp2 x pp2"])
    checkpoint = agree_or_raise(world.channel, lambda: Checkpoint(folder))
    damage(stage)
    world.channel.barrier()
    began, seen = time.monotonic(), []
    try:
        load_stage(
            stage, checkpoint, world, extent_bytes=EXTENT_BYTES, progress=lambda figures: seen.append(figures.done_bytes)
        )
    except CheckpointError as error:
        text, agreed = str(error), error.agreed
    else:
        raise AssertionError("nothing was raised")
    finally:
        os.preadv = preadv
    assert world.channel.all_gather(world.rank) == list(range(world.size)), "the world goes on"
    return {"error": text, "agreed": agreed, "seconds": time.monotonic() - began, "extents": len(seen)}


def damages(world: World, second: Path) -> dict[str, Callable[[StageModel], None]]:
    """What happens between the reading of the headers and that of the data; `second` is a file of the checkpoint."""
    last_reader = world.local_rank == 0 and world.node_index == world.num_nodes - 1

    def broken_disk(stage: StageModel) -> None:
        def failing(descriptor: int, buffers: list, offset: int) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        if last_reader:
            os.preadv = failing

    def refused(stage: StageModel) -> None:
        def refuse(full: torch.Tensor) -> None:
            raise CheckpointError("a layer of rank 3 refuses its tensor")

        if world.rank == 3:
            loaders = stage.weights()
            stage.weights = lambda: {**loaders, next(iter(loaders)): refuse}

    def truncated(stage: StageModel) -> None:
        if world.rank == 0:
            os.truncate(second, second.stat().st_size - 1)

    def removed(stage: StageModel) -> None:
        if world.rank == 0:
            second.unlink()

    return {"broken disk": broken_disk, "refused": refused, "removed": removed, "truncated": truncated}


def main(place: Place) -> int:
    folder, results = map(Path, sys.argv[1:])
    world = start_world(deadline_s=30)
    place.rank, place.size, place.host, place.abort = world.rank, world.size, world.host, world.abort
    found = {name: load_case(world, folder, layout) for name, layout in LAYOUTS.items()}
    second = sorted(folder.glob("*.safetensors"))[1]
    whole = second.read_bytes()
    world.channel.barrier()  # others may still have the file mapped, to compare with
    for name, damage in damages(world, second).items():
        if world.rank == 0:
            second.write_bytes(whole)
        world.channel.barrier()
        found[name] = failing_case(world, folder, damage)
    (results / f"{world.rank}.json").write_text(json.dumps(found))
    world.close()
    return 0


if __name__ == "__main__":
    die_with_parent()
    sys.exit(run_as_rank(main))
