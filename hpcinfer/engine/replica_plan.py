"""What one rank of a replica will hold, decided before weights are read: checks, the attention backend, pages, limits.

Everything that can be wrong is looked for here, and everything that a scheduling decision depends on is agreed over the replica.
"""

from __future__ import annotations

import dataclasses
import os
import platform

import torch

from hpcinfer.attention.base import AttentionBackend, AttentionQuery
from hpcinfer.attention.registry import ENVIRONMENT_VARIABLE, AttentionChoice, attention_query, select_backend
from hpcinfer.comm.host import HostChannel
from hpcinfer.config.job import EngineSection
from hpcinfer.config.model import ModelConfig
from hpcinfer.config.parallel import ParallelConfig, check_layout
from hpcinfer.engine.memory import context_limit, num_kv_blocks
from hpcinfer.errors import ConfigError
from hpcinfer.models.footprint import layer_cost
from hpcinfer.parallel.agree import agree, together
from hpcinfer.parallel.groups import ReplicaGroups
from hpcinfer.pipeline.partition import explicit_split, split_layers
from hpcinfer.scheduler.limits import SchedulerLimits


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
    layers, query, own = together(world, lambda: _plan_rank(model, parallel, engine, groups.mesh.stage, dtype, device))
    page = agree(groups.control, minimum={}, leader={"attention": own.backend.name, "block_size": own.block_size})

    def fit() -> tuple[AttentionChoice, bool, int]:
        choice = _as_leader(own, query, page["attention"], page["block_size"])
        return choice, uses_graphs(engine.graphs, choice.backend, device), num_kv_blocks(
            model, engine, layers=layers, parallel=parallel, block_size=choice.block_size, dtype=dtype,
            available_bytes=available_bytes, device_type=device.type,
        )

    choice, captured, blocks = together(world, fit)
    ahead = runs_ahead(engine.run_ahead, parallel, device)
    limits = SchedulerLimits(
        num_blocks=agree(groups.control, minimum={"num_blocks": blocks}, leader={})["num_blocks"],
        block_size=choice.block_size,
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
        model=model, dtype=dtype, layers=layers, device=device, attention=choice.backend, passed_over=choice.passed_over,
        engine=engine, graphs=captured, two_batch=parallel.two_batch, limits=limits,
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
    model: ModelConfig, parallel: ParallelConfig, engine: EngineSection, stage: int, dtype: str, device: torch.device
) -> tuple[range, AttentionQuery, AttentionChoice]:
    """This rank's layers, what it asks of an attention backend, and the one it would take."""
    check_layout(model, parallel)
    runs_ahead(engine.run_ahead, parallel, device)
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
