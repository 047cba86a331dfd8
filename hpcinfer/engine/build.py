"""Puts a replica together on one rank: checks, weights, pages, scheduler.

Everything that can be wrong is looked for before weights are read, and everything that a scheduling decision depends on is
agreed over the replica.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable

import torch

from hpcinfer.attention.base import AttentionBackend, AttentionQuery
from hpcinfer.attention.registry import ENVIRONMENT_VARIABLE, AttentionChoice, attention_query, select_backend
from hpcinfer.comm.host import HostChannel
from hpcinfer.config.job import EngineSection
from hpcinfer.config.model import ModelConfig
from hpcinfer.config.parallel import ParallelConfig, check_layout
from hpcinfer.engine.memory import context_limit, num_kv_blocks
from hpcinfer.engine.overlap import with_two_batch
from hpcinfer.engine.replica import Replica
from hpcinfer.engine.worker import Worker
from hpcinfer.errors import ConfigError
from hpcinfer.models.base import StageModel
from hpcinfer.models.footprint import layer_cost
from hpcinfer.models.registry import model_class
from hpcinfer.observe.metrics import PhaseClock
from hpcinfer.observe.trace import Recorder
from hpcinfer.parallel.agree import agree, together
from hpcinfer.parallel.groups import ReplicaGroups
from hpcinfer.pipeline.partition import explicit_split, split_layers
from hpcinfer.pipeline.runner import StageRunner
from hpcinfer.pipeline.transfer import StageLinks
from hpcinfer.pipeline.watch import SegmentWatch
from hpcinfer.scheduler.limits import SchedulerLimits
from hpcinfer.scheduler.scheduler import Scheduler


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaPlan:
    """What one rank will hold, known before weights are read."""

    model: ModelConfig
    dtype: str
    """float32, bfloat16 or float16: of weights, activations and pages."""
    layers: range
    """This rank's stage."""
    device: torch.device
    """Where this rank computes."""
    attention: AttentionBackend
    passed_over: dict[str, str]
    """Attention backends that would have been preferred, each with the condition that failed; empty where the job names one."""
    two_batch: str
    """`parallel.two_batch`; what it comes to is measured when the weights are there."""
    limits: SchedulerLimits
    """Agreed over the replica."""


def plan_replica(
    model: ModelConfig,
    parallel: ParallelConfig,
    engine: EngineSection,
    groups: ReplicaGroups,
    world: HostChannel,
    *,
    dtype: str,
    device: torch.device,
    available_bytes: int,
) -> ReplicaPlan:
    """Check model, layout and memory against each other and agree. Collective over the world.

    Args:
        world: channel over all ranks: a misfit on one of them is raised on all.
        dtype: "auto" takes the checkpoint's own.
        available_bytes: memory that this rank may use.

    Raises:
        ConfigError: a misfit, with the nearest valid choice.
    """
    dtype = model.dtype if dtype == "auto" else dtype
    layers, query, own = together(world, lambda: _plan_rank(model, parallel, engine, groups.mesh.stage, dtype, device))
    page = agree(groups.control, minimum={}, leader={"attention": own.backend.name, "block_size": own.block_size})

    def fit() -> tuple[AttentionChoice, int]:
        choice = _as_leader(own, query, page["attention"], page["block_size"])
        return choice, num_kv_blocks(
            model, engine, layers=layers, parallel=parallel, block_size=choice.block_size, dtype=dtype,
            available_bytes=available_bytes,
        )

    choice, blocks = together(world, fit)
    limits = SchedulerLimits(
        num_blocks=agree(groups.control, minimum={"num_blocks": blocks}, leader={})["num_blocks"],
        block_size=choice.block_size,
        max_batch_tokens=engine.max_batch_tokens,
        max_sequences=engine.max_sequences,
        max_context=context_limit(model, engine),
        lag=parallel.num_in_flight,
        num_lanes=parallel.sp,
        sp_min_tokens=parallel.sp_min_tokens,
        eos_token_ids=frozenset(model.eos_token_ids),
    )
    return ReplicaPlan(
        model=model, dtype=dtype, layers=layers, device=device, attention=choice.backend, passed_over=choice.passed_over,
        two_batch=parallel.two_batch, limits=limits,
    )


def _plan_rank(
    model: ModelConfig, parallel: ParallelConfig, engine: EngineSection, stage: int, dtype: str, device: torch.device
) -> tuple[range, AttentionQuery, AttentionChoice]:
    """This rank's layers, what it asks of an attention backend, and the one it would take."""
    check_layout(model, parallel)
    layers = stage_layers(model, parallel)[stage]
    query = attention_query(
        model, tp=parallel.tp, block_size=engine.block_size, dtype=getattr(torch, dtype), device=device
    )
    choice = select_backend(query, setting=engine.attention, environment=os.environ.get(ENVIRONMENT_VARIABLE, ""))
    return layers, query, choice


def _as_leader(own: AttentionChoice, query: AttentionQuery, name: str, block_size: int) -> AttentionChoice:
    """What the replica's leader chose, on this rank: all ranks of a replica compute alike and have the same pages."""
    if (own.backend.name, own.block_size) == (name, block_size):
        return own
    try:
        return select_backend(dataclasses.replace(query, block_size=block_size), setting=name)
    except ConfigError as error:
        raise ConfigError(
            f"{platform.node()} cannot compute attention as the leader of its replica does, with {name} and pages of "
            f"{block_size} tokens",
            found=error.found, fix=f"give all nodes the same packages and GPUs, or set engine.attention = {own.backend.name!r}",
        ) from error


def stage_layers(model: ModelConfig, parallel: ParallelConfig) -> list[range]:
    """The layers of every stage: as the job says, or split by what a token costs in each, embedding and head counted.

    Costs are in numbers of weights that a token meets. The embedding reads one row of D for a token, and as much for a learned
    position; the head multiplies ceil(V / tp) rows of D.
    """
    if parallel.layer_split:
        return explicit_split(parallel.layer_split)
    return split_layers(
        [layer_cost(model, layer, parallel.tp) for layer in range(model.num_layers)], parallel.pp,
        first_extra=model.hidden_size * (2 if model.learned_positions else 1),
        last_extra=-(-model.vocab_size // parallel.tp) * model.hidden_size,
    )


def build_replica(
    plan: ReplicaPlan,
    groups: ReplicaGroups,
    *,
    clock: PhaseClock,
    load: Callable[[StageModel], None],
    recorder: Recorder | None = None,
) -> Replica:
    """Make the stage, give it its weights by `load`, allocate the pages. Collective over the replica.

    Args:
        load: puts weights into the stage (from a checkpoint, or random ones).
        recorder: gets what this rank does from now on.
    """
    dtype = getattr(torch, plan.dtype)
    with clock.phase("load"):
        model = model_class(plan.model)(
            plan.model, layers=plan.layers, axes=groups.axes, backend=plan.attention, dtype=dtype, device=plan.device
        )
        load(model)
        kv = model.allocate_kv(num_blocks=plan.limits.num_blocks, block_size=plan.limits.block_size)
        links = StageLinks(
            groups.from_previous, groups.to_next, hidden_size=plan.model.hidden_size, dtype=dtype, device=plan.device
        )
        lane = groups.mesh.lane
        nvtx = torch.cuda.nvtx if recorder is not None and plan.device.type == "cuda" else None
        runner = StageRunner(model, kv, links, lane=lane, watch=SegmentWatch(groups.mark, recorder, nvtx))
        worker = Worker(runner, groups, device=plan.device, clock=clock, recorder=recorder)
        groups.warmup()
        limits = with_two_batch(plan.two_batch, model, kv, plan.limits, groups.control, lane=lane)
    return Replica(
        worker=worker, scheduler=Scheduler(limits, lane), control=groups.control, mark=groups.mark, recorder=recorder,
        expert_load=model.expert_load,
    )
