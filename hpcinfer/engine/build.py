"""Puts a replica together on one rank, as planned: weights, pages, captured steps, scheduler."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch

from hpcinfer.comm.streams import CudaStreams
from hpcinfer.engine.overlap import with_two_batch
from hpcinfer.engine.profile import Meter, profiled_limits
from hpcinfer.engine.replica import Replica
from hpcinfer.engine.replica_plan import ReplicaPlan
from hpcinfer.engine.step_clock import DeviceStepClock, HostStepClock, StepClock
from hpcinfer.engine.worker import Worker
from hpcinfer.kvcache.pool import KvPool
from hpcinfer.models.base import StageModel
from hpcinfer.models.registry import model_class
from hpcinfer.observe.metrics import PhaseClock
from hpcinfer.observe.trace import Recorder
from hpcinfer.parallel.groups import ReplicaGroups
from hpcinfer.pipeline.graphs import CudaGraph, DecodeGraphs, Graph, decode_buckets
from hpcinfer.pipeline.runner import StageRunner
from hpcinfer.pipeline.transfer import StageLinks
from hpcinfer.pipeline.watch import SegmentWatch
from hpcinfer.sampling.grammar import Grammars
from hpcinfer.sampling.masks import TokenMasks
from hpcinfer.scheduler.balance import share
from hpcinfer.scheduler.limits import SchedulerLimits
from hpcinfer.scheduler.scheduler import Scheduler


def build_replica(
    plan: ReplicaPlan,
    groups: ReplicaGroups,
    *,
    clock: PhaseClock,
    load: Callable[[StageModel], None],
    recorder: Recorder | None = None,
    meter: Meter | None = None,
    make_graph: Callable[[], Graph] | None = None,
    grammars: Grammars | None = None,
) -> Replica:
    """Make the stage, give it its weights by `load`, allocate the pages. Collective over the replica.

    Args:
        load: puts weights into the stage (from a checkpoint, or random ones).
        recorder: gets what this rank does from now on.
        meter: measures what the largest step leaves free for pages; None keeps the computed number.
        make_graph: what captures decode steps; by default CUDA graphs where the plan has them.
        grammars: constraints of the model's texts; None where no request has one.
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
        expert_load=model.expert_load, grammars=grammars,
        masks=TokenMasks(grammars, plan.device) if grammars is not None and groups.mesh.is_sampler else None,
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
