"""Where the time of a traced start went: per rank, per axis of the mesh, per stage. Reads records only.

Computation and host work, exposed communication and idling are each the union of their own records. A rank's main
thread does one thing at a time, so that where records nest, the innermost counts: what waits inside host work is exposed
communication, and not work. `other` is time without any record: it says how complete the records are.

Shape letters: R records of a rank, N disjoint intervals in ascending order.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from hpcinfer.observe.trace import COMPUTE, HOST, IDLE, TICK, TRANSFER, WAIT
from hpcinfer.observe.trace_file import Trace

AXES = ("tp", "sp", "ep", "pp", "tokens", "control")
"""In the order of the table. The control channel of a replica and the world's are one axis."""
STAGE_AXES = ("tp", "sp", "ep")
"""Axes among the ranks of one stage: waiting on them is no bubble of the pipeline."""
_LAYER = re.compile(r"layer (\d+) (.+)")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RankTime:
    """Seconds of one rank. compute + exposed + idle + other = wall."""

    rank: int
    host: str
    stage: int
    wall_s: float
    compute_s: float
    """Segments of forwards, drawing, scheduling, reading, committing."""
    segments_s: float
    """Part of it: segments of forwards and drawing alone."""
    exposed_s: float
    """Blocked in communication: nothing was computed meanwhile."""
    idle_s: float
    """Waiting to be told what to do, for rows, for the end."""
    other_s: float
    """Not recorded."""
    steps: int
    """Ticks in which this rank computed."""
    dropped: bool
    """There were too many records to keep; wall begins where those that are left do."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AxisTime:
    """The communication of one axis, as a mean over the ranks that have it."""

    axis: str
    ranks: int
    operations_per_step: float
    bytes_per_step: float
    """Of a rank's own tensors."""
    transfer_s: float
    """From start to end, added up; transfers that overlap count each. A receive starts when it is posted."""
    exposed_s: float
    """Part of it, during which the rank computed nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StageTime:
    """A stage of a replica, as a mean over its ranks."""

    replica: int
    stage: int
    window_s: float
    """From its first segment to its last."""
    bubble: float
    """Share of the window in which it neither computed nor waited for a transfer inside the stage (tp, sp, ep)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TraceReport:
    """All of it, for one start."""

    start: str
    layout: str
    ranks: tuple[RankTime, ...]
    axes: tuple[AxisTime, ...]
    stages: tuple[StageTime, ...]
    missing: tuple[int, ...]
    """Ranks of the start that have no trace."""


def analyse(traces: Sequence[Trace]) -> TraceReport:
    """The report of one start from the traces of its ranks."""
    return TraceReport(
        start=traces[0].header["started"],
        layout=traces[0].header["layout"],
        ranks=tuple(rank_time(trace) for trace in traces),
        axes=tuple(time for axis in AXES if (time := axis_time(traces, axis)) is not None),
        stages=stage_times(traces),
        missing=tuple(sorted(set(range(traces[0].header["num_ranks"])) - {trace.rank for trace in traces})),
    )


def rank_time(trace: Trace) -> RankTime:
    """Where one rank's wall time went."""
    start_s, end_s = trace.header["start_s"], trace.header["end_s"]
    if trace.header["dropped"] and len(trace):
        start_s = float(trace["end_s"].min())
    wall = np.array([[start_s, end_s]])
    exposed = both(_of_kinds(trace, WAIT), wall)
    idle = minus(both(_of_kinds(trace, IDLE), wall), exposed)
    work = minus(both(_of_kinds(trace, COMPUTE, TICK, HOST), wall), union(np.concatenate((exposed, idle))))
    segments = minus(both(_of_kinds(trace, COMPUTE), wall), union(np.concatenate((exposed, idle))))
    parts = [length(work), length(exposed), length(idle)]
    return RankTime(
        rank=trace.rank, host=trace.header["host"], stage=trace.header["coordinates"]["stage"],
        wall_s=end_s - start_s, compute_s=parts[0], segments_s=length(segments), exposed_s=parts[1], idle_s=parts[2],
        other_s=end_s - start_s - sum(parts), steps=len(step_ticks(trace)), dropped=trace.header["dropped"],
    )


def axis_time(traces: Sequence[Trace], axis: str) -> AxisTime | None:
    """One axis; None where no rank has communicated on it in a step."""
    rows = []
    for trace in traces:
        on_axis = np.array([axis_of(text) == axis for text in trace.texts], bool)[trace["track"]]
        in_step = np.isin(trace["tick"], step_ticks(trace))
        transfers = on_axis & in_step & (trace["kind"] == TRANSFER)
        waits = on_axis & (trace["kind"] == WAIT) & in_step
        if steps := len(step_ticks(trace)) if transfers.any() else 0:
            rows.append((
                transfers.sum() / steps, trace["bytes"][transfers].sum() / steps,
                (trace["end_s"] - trace["start_s"])[transfers].sum(), length(_intervals(trace, waits)),
            ))
    if not rows:
        return None
    operations, num_bytes, transfer_s, exposed_s = np.mean(rows, axis=0).tolist()
    return AxisTime(
        axis=axis, ranks=len(rows), operations_per_step=operations, bytes_per_step=num_bytes, transfer_s=transfer_s,
        exposed_s=exposed_s,
    )


def stage_times(traces: Sequence[Trace]) -> tuple[StageTime, ...]:
    """Every stage of every replica."""
    found: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for trace in traces:
        segments = _intervals(trace, (trace["kind"] == COMPUTE) & (trace["tick"] >= 0))
        if len(segments):
            window = np.array([[segments[0, 0], segments[-1, 1]]])
            inside = np.array([axis_of(text) in STAGE_AXES for text in trace.texts], bool)[trace["track"]]
            exposed = _intervals(trace, (trace["kind"] == WAIT) & inside)
            outside = _intervals(trace, ((trace["kind"] == WAIT) & ~inside) | (trace["kind"] == IDLE))
            work = minus(_of_kinds(trace, COMPUTE, TICK, HOST), outside)
            busy = both(union(np.concatenate((work, exposed))), window)
            place = trace.header["coordinates"]
            found.setdefault((place["replica"], place["stage"]), []).append(
                (length(window), 1 - length(busy) / length(window))
            )
    return tuple(
        StageTime(replica=replica, stage=stage, window_s=float(window_s), bubble=float(bubble))
        for (replica, stage), rows in sorted(found.items()) for window_s, bubble in [np.mean(rows, axis=0)]
    )


def step_ticks(trace: Trace) -> np.ndarray:
    """The ticks in which this rank computed, int64, ascending."""
    return np.unique(trace["tick"][(trace["kind"] == COMPUTE) & (trace["tick"] >= 0)])


def operations_by_tick(trace: Trace, axis: str) -> dict[int, dict[str, int]]:
    """For every step of this rank: verb -> number of operations on the axis."""
    counts: dict[int, dict[str, int]] = {int(tick): {} for tick in step_ticks(trace)}
    wanted = trace["kind"] == TRANSFER
    for tick, track, verb in zip(
        trace["tick"][wanted], trace.text("track")[wanted], trace.text("verb")[wanted], strict=True
    ):
        if axis_of(track) == axis and int(tick) in counts:
            counts[int(tick)][verb] = counts[int(tick)].get(verb, 0) + 1
    return counts


def axis_of(track: str) -> str:
    """The axis of a communicator by its name: "pp 0>1" is pp. "" for none."""
    axis = track.split(" ")[0]
    return "control" if axis == "world" else axis if axis in AXES else ""


def layer_of(label: str) -> tuple[int, str] | None:
    """(3, "o") for "layer 3 o"; None where a label names no layer."""
    match = _LAYER.fullmatch(label)
    return (int(match[1]), match[2]) if match else None


def to_plain(report: TraceReport) -> Mapping:
    """As JSON holds it."""
    return dataclasses.asdict(report)


# -- intervals: float64 [N, 2], disjoint, ascending ------------------------------------------------------------------


def union(intervals: np.ndarray) -> np.ndarray:
    """Any intervals [M, 2] -> the disjoint ones that cover the same points."""
    intervals = intervals[intervals[:, 1] > intervals[:, 0]]
    if not len(intervals):
        return np.empty((0, 2))
    intervals = intervals[np.argsort(intervals[:, 0], kind="stable")]
    ends = np.maximum.accumulate(intervals[:, 1])
    first = np.concatenate(([True], intervals[1:, 0] > ends[:-1]))
    last = np.concatenate((first[1:], [True]))
    return np.stack((intervals[first, 0], ends[last]), axis=1)


def minus(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The points of `a` that are not in `b`; both disjoint and ascending."""
    gaps = np.stack((np.concatenate(([-np.inf], b[:, 1])), np.concatenate((b[:, 0], [np.inf]))), axis=1)
    return both(a, gaps)


def both(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The points in `a` and in `b`; both disjoint and ascending."""
    # For each interval of a the range of those of b that touch it.
    first = np.searchsorted(b[:, 1], a[:, 0], side="right")
    last = np.maximum(np.searchsorted(b[:, 0], a[:, 1], side="left"), first)
    counts = last - first
    of_a = np.repeat(np.arange(len(a)), counts)
    of_b = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
    found = np.stack((np.maximum(a[of_a, 0], b[of_b, 0]), np.minimum(a[of_a, 1], b[of_b, 1])), axis=1)
    return found[found[:, 1] > found[:, 0]]


def length(intervals: np.ndarray) -> float:
    """Seconds in disjoint intervals."""
    return float((intervals[:, 1] - intervals[:, 0]).sum())


def _intervals(trace: Trace, mask: np.ndarray) -> np.ndarray:
    return union(np.stack((trace["start_s"][mask], trace["end_s"][mask]), axis=1))


def _of_kinds(trace: Trace, *kinds: int) -> np.ndarray:
    return _intervals(trace, np.isin(trace["kind"], kinds))
