"""Limits of the processes, shared memory, and the clocks of the nodes."""

from __future__ import annotations

import dataclasses
import os
import resource
import statistics
import time
from collections.abc import Sequence
from typing import Any

from hpcinfer.comm.host import HostChannel
from hpcinfer.doctor.finding import Finding, RankPlace, absent, by_value, green, host_names, places_of, red, who, yellow
from hpcinfer.runner.tracing import measure_clock
from hpcinfer.units import format_bytes, format_count

FEW_FILES = 1024
"""What systems allow by default; below it something has lowered it."""
FILES_A_RANK = 128
"""Open at once without connections: libraries, checkpoint, prompts, segments, logs."""
FILES_A_PEER = 2
"""Connections to each other rank, where MPI goes over TCP."""
SHARED_BYTES = 64 * 2**20
"""Of /dev/shm, for each rank of a node: what MPI and NCCL take for transfers inside a node."""
SKEW_S, BAD_SKEW_S = 1.0, 60.0
UNLIMITED = resource.RLIM_INFINITY
_MANY = 2**31


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LimitFacts:
    """Limits of one rank."""

    place: RankPlace
    files: int
    """Open file handles, the limit in force."""
    most_files: int
    """To which the process itself may raise it."""
    locked_bytes: int = UNLIMITED
    """Memory that may be pinned."""
    address_bytes: int = UNLIMITED
    """Virtual memory."""
    file_bytes: int = UNLIMITED
    """Size of a file."""
    shared_free_bytes: int | None = None
    """Free in /dev/shm; None without one."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ClockFacts:
    """One rank's clock against rank 0's."""

    place: RankPlace
    ahead_s: float
    """By how much the time of day is ahead of rank 0's."""
    error_s: float
    """How wrong that may be."""


def gather_limits(place: RankPlace) -> LimitFacts:
    """This rank's own."""
    files, most_files = (_MANY if limit == UNLIMITED else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    return LimitFacts(
        place=place, files=files, most_files=most_files, locked_bytes=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        address_bytes=resource.getrlimit(resource.RLIMIT_AS)[0], file_bytes=resource.getrlimit(resource.RLIMIT_FSIZE)[0],
        shared_free_bytes=_shared_free_bytes(),
    )


def gather_clock(channel: HostChannel, place: RankPlace) -> ClockFacts:
    """Measure. Collective over `channel`."""
    measured = measure_clock(channel)
    # Both clocks of this rank at one moment: the time of day is perf_counter plus this.
    difference_s = time.time() - time.perf_counter()
    return clock_facts(place, measured, difference_s, channel.broadcast(difference_s))


def clock_facts(place: RankPlace, measured: dict[str, Any], difference_s: float, rank0_difference_s: float) -> ClockFacts:
    """Offset of the time of day from that of perf_counter, and what lies between the two on this rank and on rank 0."""
    return ClockFacts(
        place=place, ahead_s=measured["offset_s"] + difference_s - rank0_difference_s, error_s=measured["error_s"]
    )


def judge_limits(
    facts: Sequence[LimitFacts], *, has_fabric: bool, has_gpu: bool, output_bytes: float = 0.0
) -> list[Finding]:
    """Limits of all ranks.

    Args:
        has_fabric: there are InfiniBand devices, which pin memory.
        has_gpu: ranks compute on GPUs.
        output_bytes: of the largest file that the run will write.
    """
    return [_files(facts), *_locked(facts, has_fabric), *_sizes(facts, has_gpu, output_bytes), _shared(facts)]


def judge_clocks(facts: Sequence[ClockFacts]) -> Finding:
    """Clocks against the median."""
    if len({each.place.node for each in facts}) == 1:
        return absent("clocks", "one node")
    usual = statistics.median_low(each.ahead_s for each in facts)
    skews = {each.place: each.ahead_s - usual for each in facts if abs(each.ahead_s - usual) - each.error_s > SKEW_S}
    if not skews:
        widest = max(abs(each.ahead_s - usual) for each in facts)
        return green("clocks", f"within {widest * 1e3:.1f} ms of each other")
    worst = max(skews, key=lambda place: abs(skews[place]))
    found = f"{host_names(skews)} off the median, {worst.host} by {skews[worst]:+.1f} s"
    fix = (
        "start chronyd or ntpd there; results do not depend on it, but the times in logs do, and munge refuses Slurm's "
        "messages from 300 s on"
    )
    make = red if abs(skews[worst]) > BAD_SKEW_S else yellow
    return make("clocks", found, fix, skews)


def _files(facts: Sequence[LimitFacts]) -> Finding:
    needed = FILES_A_RANK + FILES_A_PEER * len(facts)
    groups = by_value((each.place, (each.files, each.most_files)) for each in facts)
    (fewest, most), places = min(groups.items(), key=lambda item: item[0])
    found = f"{format_count(fewest)} on {who(places)}; {len(facts)} ranks need {needed} each"
    fix = f"ulimit -n {max(needed, min(most, 65536))} in the batch script before srun" + (
        "" if most >= needed else " (the hard limit there is lower: have it raised in limits.conf or slurmd's LimitNOFILE)"
    )
    if fewest < needed:
        return red("file handles", found, fix, places)
    if fewest < FEW_FILES:
        return yellow("file handles", found, fix, places)
    return green("file handles", f"{format_count(fewest)} for each rank")


def _locked(facts: Sequence[LimitFacts], has_fabric: bool) -> list[Finding]:
    if not has_fabric:
        return [absent("locked memory", "no InfiniBand, which alone needs it")]
    limited = [each for each in facts if each.locked_bytes != UNLIMITED]
    if not limited:
        return [green("locked memory", "unlimited")]
    places = places_of(limited)
    return [red(
        "locked memory", f"{format_bytes(limited[0].locked_bytes)} on {who(places)}",
        "InfiniBand pins what it sends: LimitMEMLOCK=infinity for slurmd and PropagateResourceLimitsExcept=MEMLOCK in "
        "slurm.conf, or ulimit -l unlimited before srun where that is allowed", places,
    )]


def _sizes(facts: Sequence[LimitFacts], has_gpu: bool, output_bytes: float) -> list[Finding]:
    findings = []
    if limited := [each for each in facts if each.address_bytes != UNLIMITED]:
        make = red if has_gpu else yellow
        findings.append(make(
            "address space", f"{format_bytes(limited[0].address_bytes)} on {who(places_of(limited))}",
            "ulimit -v unlimited: CUDA and mapped files take far more addresses than memory", places_of(limited),
        ))
    if small := [each for each in facts if each.file_bytes != UNLIMITED and each.file_bytes < max(output_bytes, 2**30)]:
        findings.append(red(
            "file size", f"{format_bytes(small[0].file_bytes)} on {who(places_of(small))}", "ulimit -f unlimited",
            places_of(small),
        ))
    return findings or [green("sizes", "no limit on addresses and files that matters")]


def _shared(facts: Sequence[LimitFacts]) -> Finding:
    nodes = {each.place.node: each for each in reversed(facts) if each.shared_free_bytes is not None}
    if not nodes:
        return absent("shared memory", "no /dev/shm")
    ranks = by_value((each.place, each.place.node) for each in facts)
    tight = [each for node, each in nodes.items() if each.shared_free_bytes < SHARED_BYTES * len(ranks[node])]
    if tight:
        worst = min(tight, key=lambda each: each.shared_free_bytes)
        found = f"{format_bytes(worst.shared_free_bytes)} free in /dev/shm of {worst.place.host}"
        return yellow(
            "shared memory", f"{found} for {len(ranks[worst.place.node])} ranks",
            "remove what others left there; in a container give it more (--shm-size)", places_of(tight),
        )
    fewest = min(each.shared_free_bytes for each in nodes.values())
    return green("shared memory", f"{format_bytes(fewest)} or more free in /dev/shm")


def _shared_free_bytes() -> int | None:
    try:
        numbers = os.statvfs("/dev/shm")
    except OSError:
        return None
    return numbers.f_bavail * numbers.f_frsize
