"""Recording a start: a recorder on every rank, and its file in the run directory at the end."""

from __future__ import annotations

import contextlib
import logging
import platform
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

import hpcinfer
from hpcinfer.comm.bootstrap import World
from hpcinfer.comm.host import HostChannel
from hpcinfer.config.job import JobConfig
from hpcinfer.data.ledger.run_directory import RunDirectory
from hpcinfer.data.ledger.writers import boot_id
from hpcinfer.observe.trace import Recorder
from hpcinfer.observe.trace_file import save_trace
from hpcinfer.parallel.groups import ReplicaGroups

FOLDER = "trace"
_CLOCK_ROUNDS = 8
_NO_DEADLINE = float("inf")


@contextlib.contextmanager
def recording(
    job: JobConfig, world: World, groups: ReplicaGroups, run: RunDirectory, *, started: str, log: logging.Logger
) -> Iterator[Recorder | None]:
    """A recorder for what this rank does inside the block, None where `run.trace` is off. Collective over the world.

    Its file is written at the end, after an error too where this rank still lives. That it cannot be written ends
    nothing.
    """
    if not job.run.trace:
        yield None
        return
    clock = [measure_clock(world.channel)]
    recorder = Recorder()
    if world.progress is not None:
        world.progress.recorder = recorder
    complete = False
    try:
        yield recorder
        world.channel.barrier(deadline_s=_NO_DEADLINE)  # the end is the same for all ranks
        complete = True
    finally:
        if world.progress is not None:
            world.progress.recorder = None
        header = trace_header(world, groups, recorder, started=started, complete=complete)
        if complete:
            clock.append(measure_clock(world.channel))
        header.update(clock=clock, same_clock=clock[0]["boot_id"] == boot_id())
        try:
            save_trace(run.path / FOLDER, recorder, header)
        except OSError as error:
            log.warning("the trace of this rank cannot be written: %s", error)


def trace_header(
    world: World, groups: ReplicaGroups, recorder: Recorder, *, started: str, complete: bool
) -> dict[str, Any]:
    """What the file of this rank says of it; the recording ends now. `clock` and `same_clock` are still to be added."""
    end_s, end_unix_s = time.perf_counter(), time.time()
    return {
        "rank": world.rank, "num_ranks": world.size, "host": world.host, "boot_id": boot_id(), "started": started,
        **_place(groups), "start_s": recorder.start_s, "end_s": end_s,
        "start_unix_s": end_unix_s - (end_s - recorder.start_s), "end_unix_s": end_unix_s, "complete": complete,
        "versions": {
            "hpcinfer": hpcinfer.__version__, "python": platform.python_version(), "numpy": np.__version__,
        },
    }


def measure_clock(channel: HostChannel) -> dict[str, Any]:
    """This rank's time.perf_counter minus rank 0's. Collective.

    Rank 0 sends at a, the others note their time b, and all of these are back at c: the offset is b - (a + c) / 2, wrong
    by at most (c - a) / 2. The fastest of several rounds counts.

    Returns:
        at_s (this rank's time of the measurement), offset_s, error_s, and the boot_id of rank 0's host.
    """
    rounds = []
    for _ in range(_CLOCK_ROUNDS):
        sent_s = time.perf_counter()
        channel.broadcast(None)
        times = channel.gather(time.perf_counter())
        back_s = time.perf_counter()
        rounds.append((back_s - sent_s, (sent_s + back_s) / 2, times))
    best = min(rounds, key=lambda each: each[0]) if channel.rank == 0 else None
    elapsed_s, middle_s, times, rank0_boot_id = channel.broadcast((*best, boot_id()) if best else None)
    exact = channel.rank == 0
    return {
        "at_s": times[channel.rank],
        "offset_s": 0.0 if exact else times[channel.rank] - middle_s,
        "error_s": 0.0 if exact else elapsed_s / 2,
        "boot_id": rank0_boot_id,
    }


def _place(groups: ReplicaGroups) -> dict[str, Any]:
    """Where in the mesh this rank is, and who else is in its communicators."""
    mesh = groups.mesh
    members = {groups.axes.tp.name: mesh.axis_ranks("tp"), groups.axes.sp.name: mesh.axis_ranks("sp")}
    if groups.axes.ep_spans_lanes:
        members[groups.axes.ep.name] = mesh.stage_ranks()
    if groups.from_previous is not None:
        members[groups.from_previous.name] = [mesh.neighbour(-1), mesh.rank]
    if groups.to_next is not None:
        members[groups.to_next.name] = [mesh.rank, mesh.neighbour(+1)]
    for lane, link in groups.tokens.items():
        members[link.name] = [mesh.rank_of(stage=mesh.pp - 1, lane=lane, tp_rank=0), mesh.leader]
    members[groups.control.name] = mesh.replica_ranks()
    return {
        "layout": str(mesh),
        "coordinates": {"replica": mesh.replica, "stage": mesh.stage, "lane": mesh.lane, "tp": mesh.tp_rank},
        "communicators": members,
    }
