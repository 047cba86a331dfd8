"""Layout and memory: whether the ranks make a mesh, and weights and keys and values fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hpcinfer.config.job import JobConfig
from hpcinfer.config.model import ModelConfig
from hpcinfer.config.parallel import check_layout
from hpcinfer.doctor.finding import Finding, RankPlace, green, red_error, who, yellow
from hpcinfer.engine.memory import context_limit, num_kv_blocks
from hpcinfer.engine.replica_plan import stage_layers
from hpcinfer.errors import ConfigError, HpcinferError
from hpcinfer.launch.host_memory import available_host_bytes
from hpcinfer.models.footprint import DTYPE_BYTES, weight_bytes
from hpcinfer.parallel.mesh import Mesh
from hpcinfer.units import format_bytes, format_count


_PAGE_TOKENS = 16
"""Where the attention backend chooses the page size: tokens that fit hardly depend on it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MemoryFacts:
    """What one rank may take."""

    place: RankPlace
    free_bytes: int
    """Its share of the node's memory, or what is free on its GPU."""
    device_type: str = "cpu"
    """cpu or cuda."""


def gather_memory(place: RankPlace, *, num_local_ranks: int, gpu_free_bytes: int | None) -> MemoryFacts:
    """This rank's own. `gpu_free_bytes`: None where it computes on the CPU."""
    if gpu_free_bytes is not None:
        return MemoryFacts(place=place, free_bytes=gpu_free_bytes, device_type="cuda")
    return MemoryFacts(place=place, free_bytes=available_host_bytes(num_local_ranks))


def num_ranks_needed(job: JobConfig) -> int:
    """Ranks of a start without a launcher: one replica, or as many as parallel.dp says."""
    return job.parallel.replica_size * (job.parallel.dp or 1)


def judge_layout(job: JobConfig, model: ModelConfig, places: Sequence[RankPlace]) -> tuple[Mesh | None, list[Finding]]:
    """The mesh of these ranks, None where there is none, and what is to be said of it."""
    parallel = job.parallel
    try:
        check_layout(model, parallel)
        context_limit(model, job.engine)
        mesh = Mesh.of(
            len(places), pp=parallel.pp, sp=parallel.sp, tp=parallel.tp, ep=parallel.ep, dp=parallel.dp or None
        )
    except HpcinferError as error:
        return None, [red_error("layout", error)]
    found = f"{len(places)} rank{'s' if len(places) > 1 else ''}: {mesh}"
    spread = [group for group in _tp_groups(mesh) if len({places[rank].node for rank in group}) > 1]
    if spread:
        members = [places[rank] for rank in spread[0]]
        return mesh, [yellow(
            "layout", f"{found}; {len(spread)} tp groups reach over nodes, one of them {who(members)}",
            "every layer then reduces over the network: choose tp so that it divides the ranks of a node, pp between nodes",
            members,
        )]
    return mesh, [green("layout", found)]


def spans_nodes(mesh: Mesh, places: Sequence[RankPlace]) -> bool:
    """Whether a replica has ranks on several nodes."""
    return any(len({places[each].node for each in mesh.at(rank).replica_ranks()}) > 1 for rank in range(mesh.size))


def judge_memory(job: JobConfig, model: ModelConfig, mesh: Mesh, facts: Sequence[MemoryFacts]) -> list[Finding]:
    """Weights and pages of each rank against what it may take. `facts`: of all ranks, in rank order."""
    dtype = model.dtype if job.model.dtype == "auto" else job.model.dtype
    layers = stage_layers(model, job.parallel)
    block_size = job.engine.block_size or _PAGE_TOKENS
    tokens: dict[RankPlace, int] = {}
    misfits: dict[RankPlace, ConfigError] = {}
    for each in facts:
        try:
            blocks = num_kv_blocks(
                model, job.engine, layers=layers[mesh.at(each.place.rank).stage], parallel=job.parallel, dtype=dtype,
                block_size=block_size, available_bytes=each.free_bytes, device_type=each.device_type,
            )
        except ConfigError as error:
            misfits[each.place] = error
        else:
            tokens[each.place] = (blocks - 1) * block_size
    if misfits:
        first = next(iter(misfits.values()))
        finding = red_error("weights and K/V", first, misfits)
        return [dataclasses.replace(finding, found=f"{who(list(misfits))}: {finding.found}")]
    return [_enough(job, model, mesh, dtype, layers, tokens)]


def _enough(
    job: JobConfig, model: ModelConfig, mesh: Mesh, dtype: str, layers: list[range], tokens: dict[RankPlace, int]
) -> Finding:
    heaviest = max(weight_bytes(model, stage, mesh.tp, DTYPE_BYTES[dtype], ep=mesh.ep) for stage in layers)
    place = min(tokens, key=tokens.__getitem__)
    longest = context_limit(model, job.engine)
    kv = format_count(tokens[place])
    found = f"on each rank weights of {format_bytes(heaviest)} ({dtype}) and K/V of {kv} tokens or more"
    if tokens[place] < longest:
        return yellow(
            "weights and K/V", f"{found}; a sequence may grow to {format_count(longest)} tokens (fewest: {who([place])})",
            "set engine.max_context to what rows need, raise engine.kv_memory, parallel.tp or parallel.pp", [place],
        )
    sequences = format_count(tokens[place] // longest)
    return green("weights and K/V", f"{found}: {sequences} sequences of {format_count(longest)}")


def _tp_groups(mesh: Mesh) -> list[list[int]]:
    return [list(range(first, first + mesh.tp)) for first in range(0, mesh.size, mesh.tp)]
