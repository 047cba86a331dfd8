"""The main job, on every rank: check, load, lead or follow, sum up."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from hpcinfer.comm.bootstrap import World
from hpcinfer.config.job import JobConfig
from hpcinfer.data.ledger.budgets import record_budget
from hpcinfer.data.ledger.coverage import Coverage
from hpcinfer.data.ledger.merge import merge_trial
from hpcinfer.data.ledger.run_directory import RunDirectory, open_existing
from hpcinfer.data.ledger.selection import select_rows
from hpcinfer.data.ledger.status import RunStatus, read_status
from hpcinfer.data.ledger.writers import Writer
from hpcinfer.engine.build import build_replica
from hpcinfer.engine.memory import available_bytes
from hpcinfer.engine.profile import meter_of
from hpcinfer.engine.replica_plan import ReplicaPlan, plan_replica
from hpcinfer.errors import ResumableError
from hpcinfer.launch.env import LaunchEnvironment
from hpcinfer.launch.signals import DrainFlag
from hpcinfer.launch.site import apply_site
from hpcinfer.models.weights import load_stage
from hpcinfer.observe.log import close_log, rank_log
from hpcinfer.observe.metrics import PHASES, PhaseClock
from hpcinfer.observe.trace import Recorder, span
from hpcinfer.parallel.agree import agree_or_raise
from hpcinfer.parallel.groups import ReplicaGroups, build_groups
from hpcinfer.runner.leader import lead, registered
from hpcinfer.runner.preflight import CheckedJob, check_job, job_tokenizer, open_run
from hpcinfer.runner.progress import LoadProgress
from hpcinfer.runner.replica_loop import LoopFigures, check_failures
from hpcinfer.runner.summary import RunSummary, expert_balance
from hpcinfer.runner.tracing import recording
from hpcinfer.runner.trial import estimate
from hpcinfer.sampling.grammar import Grammars
from hpcinfer.units import format_count

_REASONS_SHOWN = 5
_NO_DEADLINE = float("inf")


@dataclasses.dataclass(kw_only=True, slots=True)
class _RankResult:
    """What one rank contributes to the summary."""

    figures: LoopFigures = dataclasses.field(default_factory=LoopFigures)
    phase_seconds: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    generation_seconds: float = 0.0
    counters: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    expert_load: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    """Layer -> int64 [experts]: tokens counted by this rank."""
    weights_read_bytes: int = 0
    """Bytes of the checkpoint that this rank got from the file system."""


def run_job(
    job: JobConfig, world: World, *, environment: LaunchEnvironment, drain: DrainFlag, quiet: bool = False
) -> RunSummary:
    """Run a job on this rank. Collective over the world; every rank gets the summary.

    Args:
        job: equal on all ranks.
        world: all ranks of this start.
        environment: of this process, for the writer's identity.
        drain: set by signals to this rank: its replica then begins nothing more and leaves.
        quiet: show nothing on the console.

    Raises:
        HpcinferError: misfits of job, model, layout and memory on all ranks together, before anything is loaded;
            TooManyFailedRows at the end.
    """
    start_s = time.monotonic()
    checked = agree_or_raise(
        world.channel, lambda: check_job(job, world.size, environment), deadline_s=_NO_DEADLINE
    )
    groups = build_groups(world, checked.mesh.at(world.rank), sequence_form=job.parallel.sequence_form)
    plan = plan_replica(
        checked.model, job.parallel, job.engine, groups, world.channel, dtype=job.model.dtype, device=world.device,
        available_bytes=available_bytes(
            world.device, num_local_ranks=world.local_size, num_device_ranks=world.num_device_ranks
        ),
    )
    # Only a job that fits makes a run directory: what it was made for cannot be changed later.
    opened = agree_or_raise(world.channel, lambda: open_run(job, checked, plan, environment), deadline_s=_NO_DEADLINE)
    plan = dataclasses.replace(plan, kv_tokens_limit=opened.kv_tokens_limit)
    run = open_existing(job.data.output)
    world.tell_drains(drain, leader=groups.mesh.leader, ranks=groups.mesh.replica_ranks())
    result = _RankResult()
    if not opened.complete:
        console = world.rank == 0 and not quiet
        log = rank_log(
            world.rank, world.host, file=run.logs / f"{checked.started}-rank{world.rank}.log", console=console
        )
        log.info(
            "%s (%s, %s) on %s, device %s: %s attention, decode steps %s", job.model.path, checked.model.family, plan.dtype,
            _layout(checked, world.size), world.device.type, plan.attention.name,
            "captured" if plan.graphs else "not captured",
        )
        if (site := apply_site("", os.environ)[1]).site:
            log.info("site %s sets %s; kept as they were: %s", site.site, _named(site.from_site), _named(site.from_user))
        for name, condition in plan.passed_over.items():
            log.info("attention %s would be preferred: %s", name, condition)
        if world.nccl_settings:
            log.info("NCCL: %s", _named(world.nccl_settings))
        try:
            with (
                recording(job, world, groups, run, started=checked.started, log=log) as recorder,
                registered(
                    job, checked, run, environment, recorder, retry_round=opened.retry_round
                ) if groups.mesh.is_leader else contextlib.nullcontext() as writer,
            ):
                result = _generate(
                    job, checked, plan, run, groups, world, writer, drain, log, recorder, console=console
                )
        except Exception:
            log.exception("this rank ends with an error")
            raise
        finally:
            close_log(log)
    groups.close()  # not after an error: it is collective, and the others do not know
    results = world.channel.all_gather(result, deadline_s=_NO_DEADLINE)
    world.forget_drains()
    return agree_or_raise(
        world.channel, lambda: _sum_up(job, checked, run, results, world, time.monotonic() - start_s),
        deadline_s=_NO_DEADLINE,
    )


def _generate(
    job: JobConfig,
    checked: CheckedJob,
    plan: ReplicaPlan,
    run: RunDirectory,
    groups: ReplicaGroups,
    world: World,
    writer: Writer | None,
    drain: DrainFlag,
    log: logging.Logger,
    recorder: Recorder | None,
    *,
    console: bool,
) -> _RankResult:
    """Load, then lead or follow until the run needs this replica no longer.

    Args:
        writer: of this life, on the leader; None on the other ranks.

    Raises:
        ResumableError: this rank's device is out of memory; the next start takes less.
    """
    clock, replica = PhaseClock(), None
    loading = LoadProgress(log if world.rank == 0 else None)
    try:
        with span(recorder, "load"):
            replica = build_replica(
                plan, groups, clock=clock, recorder=recorder,
                load=lambda stage: load_stage(stage, checked.checkpoint, world, progress=loading.update),
                meter=meter_of(world.device, num_ranks=world.num_device_ranks),
                grammars=Grammars(
                    lambda: job_tokenizer(job), vocab_size=checked.model.vocab_size, eos_token_ids=checked.model.eos_token_ids
                ),
            )
        limits = replica.scheduler.limits
        log.info(
            "loaded in %.1f s (%s); K/V cache for %s tokens; two-batch overlap %s; rows are written to %s",
            clock.seconds["load"], loading.total(), format_count(limits.num_tokens),
            f"from {limits.two_batch_tokens} tokens on" if limits.two_batch_tokens else "off", run.path,
        )
        start_s = time.monotonic()
        result = _RankResult(phase_seconds=clock.seconds, weights_read_bytes=loading.figures.read_bytes)
        if writer is not None:
            result.figures = lead(
                job, checked, run, writer, replica, drain=drain, clock=clock, log=log, console=console,
                forecasts=world.rank == 0, recorder=recorder,
            )
            result.counters = collections.Counter(dataclasses.asdict(replica.scheduler.counters))
        else:
            # Between ticks the leader may wait for a storage that refuses, and it says something while it idles.
            replica.follow(silence_s=job.comm.deadline_s + job.run.retry_s)
        result.generation_seconds = time.monotonic() - start_s
        result.expert_load = replica.expert_load()
        with span(recorder, "release"):
            replica.close()
            del replica
        return result
    except torch.OutOfMemoryError as cause:
        limits = plan.limits if replica is None else replica.scheduler.limits
        raise _out_of_memory(job, run, world, limits.num_tokens, cause) from cause


def _out_of_memory(
    job: JobConfig, run: RunDirectory, world: World, num_tokens: int, cause: torch.OutOfMemoryError
) -> ResumableError:
    """The error of a rank whose device ran out of memory, with less for the next start on record."""
    less = record_budget(
        run, layout=job.parallel.replica_layout, num_tokens=num_tokens, place=f"rank {world.rank} on {world.host}"
    )
    return ResumableError(
        f"the device of this rank is out of memory with K/V pages for {format_count(num_tokens)} tokens",
        found=str(cause).splitlines()[0],
        fix=f"start again: in this layout the next start takes pages for {format_count(less)} tokens",
    )


def _sum_up(
    job: JobConfig, checked: CheckedJob, run: RunDirectory, results: list[_RankResult], world: World, seconds: float
) -> RunSummary:
    status = read_status(run, exact=True)
    figures = [result.figures for result in results]
    failures = sum((f.failures for f in figures), collections.Counter())
    counters = sum((result.counters for result in results), collections.Counter())
    check_failures(status.num_failed, job.run.allowed_failures(status.num_total), failures)
    trial = _trial(job, checked, run, results, world, seconds, status) if job.data.is_trial else {}
    return RunSummary(
        complete=status.complete,
        output=str(run.generations if status.complete else run.trial if trial.get("is_done") else run.path),
        rows=status.num_total,
        ok=status.num_done,
        failed=status.num_failed,
        partial=status.num_partial,
        missing=status.num_total - status.num_done - status.num_failed - status.num_partial,
        failures=dict(failures.most_common(_REASONS_SHOWN)),
        generated_rows=sum(f.rows for f in figures),
        prompt_tokens=sum(f.prompt_tokens for f in figures),
        output_tokens=sum(f.output_tokens for f in figures),
        seconds=seconds,
        generation_seconds=max(result.generation_seconds for result in results),
        phase_seconds={
            phase: sum(result.phase_seconds[phase] for result in results) / len(results) for phase in PHASES
        },
        layout=_layout(checked, world.size),
        nccl=world.nccl_settings,
        counters=dict(counters),
        task=job.task.kind,
        experts=expert_balance([result.expert_load for result in results]),
        weights_read_bytes=sum(result.weights_read_bytes for result in results),
        trial=trial,
    )


def _trial(
    job: JobConfig, checked: CheckedJob, run: RunDirectory, results: list[_RankResult], world: World, seconds: float, status: RunStatus
) -> dict[str, Any]:
    """What a trial found out. One that has all of its rows leaves them in a file of their own, unless the whole run is complete."""
    coverage = Coverage(run, checked.num_rows, selection=select_rows(job.data.rows, job.data.limit, checked.num_rows))
    coverage.refresh()
    if not coverage.is_full:
        return {"is_done": False}
    if not status.complete:
        merge_trial(run, checked.num_rows)
    facts = estimate(
        [result.figures.statistics for result in results],
        num_rows=status.num_total,
        num_trial=coverage.num_wanted,
        ended=sum(result.figures.rows for result in results),
        output_tokens=sum(result.figures.output_tokens for result in results),
        start_up_s=max(0.0, seconds - max(result.figures.statistics.seconds for result in results)),
        max_sequences=job.engine.max_sequences,
        num_ranks=world.size,
        device=world.device.type,
        is_drawn=job.data.limit > 0,
    )
    run.write_trial(facts)
    return {"is_done": True, **facts}


def _named(variables: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in variables.items()) or "nothing"


def _layout(checked: CheckedJob, num_ranks: int) -> str:
    return f"{num_ranks} rank{'s' if num_ranks > 1 else ''} ({checked.mesh})"
