"""Puts a replica together on one rank: checks, weights, pages, scheduler.

Everything that can be wrong is looked for before weights are read, and everything that a scheduling decision depends on is
agreed over the replica.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from functools import partial

import torch

from hpcinfer.attention.base import AttentionBackend
from hpcinfer.attention.registry import ENVIRONMENT_VARIABLE, attention_query, select_backend
from hpcinfer.comm.host import HostChannel
from hpcinfer.comm.streams import CudaStreams
from hpcinfer.config.job import EngineSection
from hpcinfer.config.model import ModelConfig
from hpcinfer.config.parallel import ParallelConfig, check_layout
from hpcinfer.errors import ConfigError
from hpcinfer.engine.memory import context_limit, num_kv_blocks
from hpcinfer.engine.overlap import with_two_batch
from hpcinfer.engine.profile import Meter, profiled_limits
from hpcinfer.engine.replica import Replica
from hpcinfer.engine.step_clock import DeviceStepClock, HostStepClock, StepClock
from hpcinfer.engine.worker import Worker
from hpcinfer.kvcache.pool import KvPool
from hpcinfer.models.base import StageModel
from hpcinfer.models.footprint import layer_cost
from hpcinfer.models.registry import model_class
from hpcinfer.observe.metrics import PhaseClock
from hpcinfer.observe.trace import Recorder
from hpcinfer.parallel.agree import agree, together
from hpcinfer.parallel.groups import ReplicaGroups
from hpcinfer.pipeline.graphs import CudaGraph, DecodeGraphs, Graph, decode_buckets
from hpcinfer.pipeline.partition import explicit_split, split_layers
from hpcinfer.pipeline.runner import StageRunner
from hpcinfer.pipeline.transfer import StageLinks
from hpcinfer.pipeline.watch import SegmentWatch
from hpcinfer.scheduler.balance import share
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
    engine: EngineSection
    """Batching and memory settings."""
    graphs: bool
    """Decode steps are captured and replayed."""
    two_batch: str
    """`parallel.two_batch`; what it comes to is measured when the weights are there."""
    limits: SchedulerLimits
    """Agreed over the replica."""
    kv_tokens_limit: int | None = None
    """Most tokens in the K/V cache, where an earlier life ran out of memory with more."""


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
    layers, attention, blocks = together(
        world, lambda: _plan_rank(model, parallel, engine, groups.mesh.stage, dtype, device, available_bytes)
    )
    agreed = agree(
        groups.control,
        minimum={"num_blocks": blocks},
        leader={
            "block_size": engine.block_size, "attention": attention.name,
            "graphs": uses_graphs(engine.graphs, attention, device),
        },
    )
    ahead = runs_ahead(engine.run_ahead, parallel, device)
    limits = SchedulerLimits(
        num_blocks=agreed["num_blocks"],
        block_size=agreed["block_size"],
        max_batch_tokens=engine.max_batch_tokens,
        max_sequences=engine.max_sequences,
        max_context=context_limit(model, engine),
        lag=parallel.num_in_flight + ahead,
        run_ahead=ahead,
        num_lanes=parallel.sp,
        sp_min_tokens=parallel.sp_min_tokens,
        eos_token_ids=frozenset(model.eos_token_ids),
    )
    return ReplicaPlan(
        model=model, dtype=dtype, layers=layers, device=device, attention=attention, engine=engine,
        graphs=agreed["graphs"],
        two_batch=parallel.two_batch, limits=limits,
    )


def uses_graphs(setting: str, attention: AttentionBackend, device: torch.device) -> bool:
    """What `engine.graphs` comes to.

    Raises:
        ConfigError: asked for where steps cannot be captured.
    """
    possible = device.type == "cuda" and attention.capturable
    if setting == "on" and not possible:
        raise ConfigError(
            'engine.graphs = "on" where decode steps cannot be captured',
            found=f"device {device.type}, attention {attention.name}",
            fix='set engine.graphs = "auto", and on a GPU engine.attention to one that can be captured (hpcinfer attention lists them)',
        )
    return possible and setting != "off"


def runs_ahead(setting: str, parallel: ParallelConfig, device: torch.device) -> bool:
    """What `engine.run_ahead` comes to.

    Raises:
        ConfigError: asked for where steps are in flight anyway.
    """
    if parallel.num_in_flight == 1:
        return setting == "on" or (setting == "auto" and device.type == "cuda")
    if setting == "on":
        raise ConfigError(
            'engine.run_ahead = "on" with several steps in flight',
            found=f"parallel.pp = {parallel.pp}, parallel.microbatches = {parallel.num_in_flight}",
            fix="leave it at auto: the steps of other sequences keep every stage busy; parallel.microbatches = pp + 1 hides the host",
        )
    return False


def _plan_rank(
    model: ModelConfig,
    parallel: ParallelConfig,
    engine: EngineSection,
    stage: int,
    dtype: str,
    device: torch.device,
    available_bytes: int,
) -> tuple[range, AttentionBackend, int]:
    """This rank's layers, attention backend and number of pages."""
    check_layout(model, parallel)
    layers = stage_layers(model, parallel)[stage]
    attention = select_backend(
        attention_query(
            model, tp=parallel.tp, block_size=engine.block_size, dtype=getattr(torch, dtype), device=device
        ),
        setting=engine.attention,
        environment=os.environ.get(ENVIRONMENT_VARIABLE, ""),
    )
    blocks = num_kv_blocks(
        model, engine, layers=layers, parallel=parallel, dtype=dtype, available_bytes=available_bytes,
        device_type=device.type,
    )
    return layers, attention, blocks


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
    meter: Meter | None = None,
    make_graph: Callable[[], Graph] | None = None,
) -> Replica:
    """Make the stage, give it its weights by `load`, allocate the pages. Collective over the replica.

    Args:
        load: puts weights into the stage (from a checkpoint, or random ones).
        recorder: gets what this rank does from now on.
        meter: measures what the largest step leaves free for pages; None keeps the computed number.
        make_graph: what captures decode steps; by default CUDA graphs where the plan has them.
    """
    dtype = getattr(torch, plan.dtype)
    with clock.phase("load"):
        model = model_class(plan.model)(
            plan.model, layers=plan.layers, axes=groups.axes, backend=plan.attention, dtype=dtype, device=plan.device
        )
        load(model)
        groups.warmup()
        lane = groups.mesh.lane
        limits = _within_memory(plan, model, groups, meter, lane)
        kv = model.allocate_kv(num_blocks=limits.num_blocks, block_size=limits.block_size)
        links = StageLinks(
            groups.from_previous, groups.to_next, hidden_size=plan.model.hidden_size, dtype=dtype, device=plan.device
        )
        limits = with_two_batch(plan.two_batch, model, kv, limits, groups.control, lane=lane)
        runner = StageRunner(
            model, kv, links, lane=lane, watch=_segment_watch(plan.device, groups, recorder),
            graphs=_captured_steps(plan, limits, model, kv, make_graph),
        )
        worker = Worker(
            runner, groups, device=plan.device, clock=_step_clock(plan.device, groups, clock),
            run_ahead=plan.limits.run_ahead, recorder=recorder,
        )
    return Replica(
        worker=worker, scheduler=Scheduler(limits, lane), control=groups.control, mark=groups.mark, recorder=recorder,
        expert_load=model.expert_load,
    )


def _within_memory(
    plan: ReplicaPlan, model: StageModel, groups: ReplicaGroups, meter: Meter | None, lane: int
) -> SchedulerLimits:
    """The plan's limits with the number of pages that there is memory for. Collective over the replica."""
    limits = plan.limits
    groups.axes.tp.reserve(limits.max_sequences * plan.model.hidden_size * model.dtype.itemsize)
    if meter is not None:
        limits = profiled_limits(model, limits, plan.engine, groups.control, lane=lane, meter=meter)
    if plan.kv_tokens_limit is not None:
        most = max(plan.kv_tokens_limit // limits.block_size, 1) + 1
        limits = dataclasses.replace(limits, num_blocks=min(limits.num_blocks, most))
    return limits


def _captured_steps(
    plan: ReplicaPlan,
    limits: SchedulerLimits,
    model: StageModel,
    kv: KvPool,
    make_graph: Callable[[], Graph] | None,
) -> DecodeGraphs | None:
    """Capture decode steps up to the largest that the scheduler makes. Collective over the replica."""
    if make_graph is None:
        if not plan.graphs:
            return None
        make_graph = partial(CudaGraph, torch.cuda.graph_pool_handle())
    divided = limits.two_batch_tokens > 0 and limits.divide_decodes
    graphs = DecodeGraphs(
        model, kv, make_graph=make_graph, max_context=limits.max_context, max_parts=2 if divided else 1,
        buckets=decode_buckets(min(share(limits.max_sequences, limits), limits.max_batch_tokens)),
    )
    graphs.capture()
    return graphs


def _segment_watch(device: torch.device, groups: ReplicaGroups, recorder: Recorder | None) -> SegmentWatch:
    if recorder is None or device.type != "cuda":
        return SegmentWatch(groups.mark, recorder)
    return SegmentWatch(groups.mark, recorder, torch.cuda.nvtx, CudaStreams(device))


def _step_clock(device: torch.device, groups: ReplicaGroups, clock: PhaseClock) -> StepClock:
    if device.type != "cuda":
        return HostStepClock(clock, groups.wait_s)
    steps = DeviceStepClock(
        clock, streams=CudaStreams(device), reporting=groups.reporting, deadline_s=groups.deadline_s
    )
    if groups.watchdog is not None:
        groups.watchdog.watch(steps)
    return steps
