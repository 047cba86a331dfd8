"""Runs on every rank: one checkpoint through several layouts in one process life, each on a sub-world of the ranks.

usage: parity_rank.py CHECKPOINT CASES.json RESULTS.npz

Rank 0 writes, for each layout, the tokens of every row and the logits from which each was drawn.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import torch

from hpcinfer.comm.bootstrap import World, start_world
from hpcinfer.config.job import EngineSection
from hpcinfer.config.model import ModelConfig
from hpcinfer.config.parallel import ParallelConfig
from hpcinfer.engine import worker as worker_module
from hpcinfer.engine.build import build_replica
from hpcinfer.engine.replica import Replica
from hpcinfer.engine.replica_plan import plan_replica, stage_layers
from hpcinfer.launch.report import Place, run_as_rank
from hpcinfer.models.checkpoint import Checkpoint
from hpcinfer.models.footprint import kv_bytes_per_token
from hpcinfer.models.weights import load_stage
from hpcinfer.observe.metrics import PhaseClock
from hpcinfer.parallel.agree import agree_or_raise
from hpcinfer.parallel.groups import ReplicaGroups, build_groups
from hpcinfer.parallel.mesh import Mesh
from hpcinfer.request import Request, SamplingParams
from hpcinfer.sampling.sampler import sample
from tests.graphs import CalledAgain
from tests.mpi import use_stand_in_if_asked


class RecordingSampler:
    """Stands in for `sample`: keeps the logits of every draw, keyed by the draw's uniform (it is unique to a token)."""

    def __init__(self) -> None:
        self.logits: dict[float, np.ndarray] = {}

    def __call__(self, logits, batch):
        for row, uniform in zip(logits, batch.uniforms.tolist(), strict=True):
            self.logits[uniform] = row.numpy().copy()
        return sample(logits, batch)


def build_layout(
    world: World, folder: str, layout: dict, engine: dict, num_blocks: int, captured: bool
) -> tuple[ReplicaGroups, Replica, list[CalledAgain]]:
    """The replica of one layout on `world`, with its communicators and the decode steps that it captures."""
    parallel = ParallelConfig(**layout)
    mesh = Mesh.of(
        world.size, pp=parallel.pp, sp=parallel.sp, tp=parallel.tp, ep=parallel.ep, rank=world.rank
    )
    groups = build_groups(world, mesh, sequence_form=parallel.sequence_form)
    checkpoint = agree_or_raise(world.channel, lambda: Checkpoint(folder))
    model = ModelConfig.from_folder(folder)
    num_layers = len(stage_layers(model, parallel)[mesh.stage])
    kv_memory = kv_bytes_per_token(model, num_layers, mesh.tp, 4) * engine["block_size"] * num_blocks
    plan = plan_replica(
        model, parallel, EngineSection(**engine, kv_memory=f"{kv_memory} B"), groups, world.channel, dtype="float32",
        device=torch.device("cpu"), available_bytes=2**30,
    )
    graphs: list[CalledAgain] = []
    replica = build_replica(
        plan, groups, clock=PhaseClock(), load=lambda stage: load_stage(stage, checkpoint, world),
        make_graph=(lambda: graphs.append(CalledAgain()) or graphs[-1]) if captured else None,
    )
    return groups, replica, graphs


def run_layout(
    world: World, folder: str, layout: dict, engine: dict, num_blocks: int, rows: list[dict], captured: bool
) -> dict | None:
    """One layout on `world`; rank 0 returns {"tokens": {row: ids}, "logits": {uniform: [V]}, "counters": {name: least}}."""
    groups, replica, graphs = build_layout(world, folder, layout, engine, num_blocks, captured)
    mesh = groups.mesh
    recorder = RecordingSampler()
    worker_module.sample = recorder
    tokens = {}
    if replica.is_leader:
        mine = [request_of(row) for row in rows if row["row"] % mesh.dp == mesh.replica]
        ended = replica.step(mine)
        while not replica.is_idle:
            ended += replica.step([])
        tokens = {e.request.row: e.output_token_ids for e in ended}
        replica.stop()
    else:
        replica.follow()
    counters = dataclasses.asdict(replica.scheduler.counters)
    for name in ("tp", "sp", "ep"):
        counters[f"{name}_operations"] = getattr(groups.axes, name).counters.operations
    counters["replays"] = sum(graph.replays for graph in graphs)
    replica.close()
    gathered = world.channel.gather((tokens, recorder.logits, counters))
    groups.close()
    if gathered is None:
        return None
    merged = {"tokens": {}, "logits": {}}
    for tokens, logits, _ in gathered:
        merged["tokens"].update(tokens)
        merged["logits"].update(logits)
    merged["counters"] = {name: min(counters[name] for *_, counters in gathered) for name in counters}
    return merged


def request_of(row: dict) -> Request:
    return Request(
        row=row["row"], prompt_token_ids=np.array(row["prompt"], np.int32), sampling=SamplingParams(**row["sampling"]),
        bad_words_token_ids=tuple(map(tuple, row["bad_words"])),
    )


def main(place: Place) -> int:
    folder, cases_file, results_file = sys.argv[1:]
    with open(cases_file) as file:
        cases = json.load(file)
    world = start_world()
    place.rank, place.size, place.host, place.abort = world.rank, world.size, world.host, world.abort
    use_stand_in_if_asked(world)
    arrays = {}
    for name, case in cases["layouts"].items():
        sub = world.first(case["ranks"])
        if sub is not None:
            engine = {**cases["engine"], **case.get("engine", {})}
            num_blocks = case.get("num_blocks", cases["num_blocks"])
            result = run_layout(sub, folder, case["layout"], engine, num_blocks, cases["rows"], case.get("captured", False))
            if result is not None:
                for row, tokens in result["tokens"].items():
                    arrays[f"{name}/tokens/{row}"] = tokens
                uniforms = sorted(result["logits"])
                arrays[f"{name}/uniforms"] = np.array(uniforms)
                arrays[f"{name}/logits"] = np.stack([result["logits"][u] for u in uniforms])
                arrays[f"{name}/counters"] = np.array(json.dumps(result["counters"]))
        world.channel.barrier()
    if world.rank == 0:
        np.savez(results_file, **arrays)
    world.close()
    return 0


if __name__ == "__main__":
    sys.exit(run_as_rank(main))
