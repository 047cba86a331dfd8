"""Runs on every rank: checkpoints through layouts, each on a sub-world of the ranks, with everything recorded.

usage: records_rank.py CASES.json FOLDER

Each rank of each case leaves FOLDER/<case number>-<rank>.pkl, a `records.RankRecords`.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hpcinfer.attention.base import AttentionBackend
from hpcinfer.attention.metadata import AttentionMetadata, token_slots
from hpcinfer.comm.bootstrap import World, start_world
from hpcinfer.comm.operation import Mark
from hpcinfer.config.job import EngineSection
from hpcinfer.config.model import ModelConfig
from hpcinfer.config.parallel import ParallelConfig
from hpcinfer.engine import worker as worker_module
from hpcinfer.engine.build import build_replica
from hpcinfer.engine.replica_plan import plan_replica
from hpcinfer.engine.replica import Replica
from hpcinfer.launch.process import die_with_parent
from hpcinfer.launch.report import Place, run_as_rank
from hpcinfer.models.checkpoint import Checkpoint
from hpcinfer.models.footprint import kv_bytes_per_token
from hpcinfer.models.weights import load_stage
from hpcinfer.observe.metrics import PhaseClock
from hpcinfer.observe.trace import Recorder
from hpcinfer.parallel.agree import agree_or_raise
from hpcinfer.parallel.groups import ReplicaGroups, build_groups
from hpcinfer.parallel.mesh import Mesh
from hpcinfer.request import Request, SamplingParams
from hpcinfer.sampling.sampler import sample
from tests.mpi import use_stand_in_if_asked
from tests.ranks.records import PageEvent, RankRecords
from tests.ranks.wrong_schedules import WRONG
from tests.unit.engine.fake_measurement import fake_measurement, gain_from


class PageRecorder(AttentionBackend):
    """Stands in for a backend and notes which slots of which layer it touches."""

    def __init__(self, backend: AttentionBackend, mark: Mark) -> None:
        self.name = backend.name
        self.events: list[PageEvent] = []
        self._backend = backend
        self._mark = mark
        self._layers: dict[int, int] = {}  # address of the pages -> layer, in the order of the first step

    def refuses(self, query):
        return self._backend.refuses(query)

    def kv_layout(self, block_size, num_kv_heads, head_dim):
        return self._backend.kv_layout(block_size, num_kv_heads, head_dim)

    def write(self, k, v, k_cache, v_cache, slots):
        self._note(True, k_cache, (slots.numpy().copy(),))
        self._backend.write(k, v, k_cache, v_cache, slots)

    def forward(self, q, k, v, k_cache, v_cache, metadata: AttentionMetadata, spec):
        self._note(False, k_cache, tuple(
            token_slots(metadata.host_block_tables, np.int64(entry), np.arange(length), metadata.block_size)
            for entry, length in enumerate(metadata.host_seq_lens)
        ))
        return self._backend.forward(q, k, v, k_cache, v_cache, metadata, spec)

    def _note(self, is_write: bool, cache: torch.Tensor, slots: tuple[np.ndarray, ...]) -> None:
        layer = self._layers.setdefault(cache.data_ptr(), len(self._layers))
        self.events.append(PageEvent(is_write, layer, self._mark.tick, self._mark.part, slots))


def run_case(world: World, case: dict) -> RankRecords:
    """One case on all ranks of `world`."""
    parallel, model = ParallelConfig(**case["layout"]), ModelConfig.from_folder(case["model"])
    mesh = Mesh.of(world.size, pp=parallel.pp, sp=parallel.sp, tp=parallel.tp, ep=parallel.ep, rank=world.rank)
    groups = build_groups(world, mesh, sequence_form=parallel.sequence_form)
    steps, drawn, recorder = {}, {}, Recorder()
    with pytest.MonkeyPatch.context() as patch:
        if case["wrong"]:
            WRONG[case["wrong"]](patch, mesh)
        if case["gains"]:  # of this rank: the smallest step that is faster divided
            least = case["gains"][world.rank]
            fake_measurement(patch, gain_from(least))
        replica, pages, plan = make_replica(case, parallel, model, groups, world, recorder)
        patch.setattr(worker_module, "sample", noting(drawn, lambda: groups.mark.tick, sample))
        schedule = replica.scheduler.schedule
        patch.setattr(replica.scheduler, "schedule", lambda: noted(steps, schedule()))
        world.progress.recorder = recorder
        generate(replica, case["rows"])
        world.progress.recorder = None
    result = RankRecords(
        mesh=mesh, members=members_of(groups), layers=plan.layers, block_size=plan.limits.block_size,
        two_batch_tokens=replica.scheduler.limits.two_batch_tokens, records=recorder.rows(),
        steps=steps, pages=pages.events, drawn=drawn,
    )
    world.channel.barrier()
    groups.close()
    return result


def make_replica(
    case: dict, parallel: ParallelConfig, model: ModelConfig, groups: ReplicaGroups, world: World, recorder: Recorder
):
    """The replica, what notes its pages, and its plan."""
    engine, device = case["engine"], torch.device("cpu")
    # The rank with most layers decides; the others take the agreed number of pages.
    kv_memory = kv_bytes_per_token(model, -(-model.num_layers // parallel.pp), parallel.tp, 4)
    kv_memory *= engine["block_size"] * case["num_blocks"]
    plan = plan_replica(
        model, parallel, EngineSection(**engine, kv_memory=f"{kv_memory} B"), groups, world.channel,
        dtype="float32", device=device, available_bytes=2**30,
    )
    pages = PageRecorder(plan.attention, groups.mark)
    checkpoint = agree_or_raise(world.channel, lambda: Checkpoint(case["model"]))
    replica = build_replica(
        dataclasses.replace(plan, attention=pages), groups, clock=PhaseClock(),
        load=lambda stage: load_stage(stage, checkpoint, world), recorder=recorder,
    )
    return replica, pages, plan


def noting(found: dict, key, function):
    """`function`, whose results are kept under `key()`."""

    def call(*args):
        found[key()] = function(*args)
        return found[key()]

    return call


def noted(steps: dict, step):
    if step is not None:
        steps[step.tick] = step
    return step


def generate(replica: Replica, rows: list[dict]) -> None:
    if not replica.is_leader:
        replica.follow()
        return
    replica.step([
        Request(
            row=number, prompt_token_ids=np.array(row["prompt"], np.int32),
            sampling=SamplingParams(ignore_eos=True, **{name: value for name, value in row.items() if name != "prompt"}),
        )
        for number, row in enumerate(rows)
    ])
    while not replica.is_idle:
        replica.step([])
    replica.stop()


def members_of(groups: ReplicaGroups) -> dict[str, list[int]]:
    """Communicator -> its ranks, for those of more than one."""
    mesh, axes = groups.mesh, groups.axes
    members = {"tp": mesh.axis_ranks("tp"), "sp": mesh.axis_ranks("sp"), "control": mesh.replica_ranks()}
    if axes.ep_spans_lanes:
        members["ep"] = mesh.stage_ranks()
    if groups.from_previous is not None:
        members[groups.from_previous.name] = [mesh.neighbour(-1), mesh.rank]
    if groups.to_next is not None:
        members[groups.to_next.name] = [mesh.rank, mesh.neighbour(+1)]
    for lane, link in groups.tokens.items():
        members[link.name] = [mesh.rank_of(stage=mesh.pp - 1, lane=lane, tp_rank=0), mesh.leader]
    return {name: ranks for name, ranks in members.items() if len(ranks) > 1}


def main(place: Place) -> int:
    cases_file, folder = sys.argv[1:]
    with open(cases_file) as file:
        cases = json.load(file)
    world = start_world(deadline_s=60)
    place.rank, place.size, place.host, place.abort = world.rank, world.size, world.host, world.abort
    use_stand_in_if_asked(world)
    for number, case in enumerate(cases):
        sub = world.first(case["ranks"])
        if sub is not None:
            result = run_case(sub, case)
            (Path(folder) / f"{number}-{sub.rank}.pkl").write_bytes(pickle.dumps(result))
        world.channel.barrier()
    world.close()
    return 0


if __name__ == "__main__":
    die_with_parent()
    sys.exit(run_as_rank(main))
