"""Traces as one JSON file in Chrome's trace event format, which Perfetto (ui.perfetto.dev) shows.

A process a rank; in it a track for computation, one for the host (ticks, reading, committing), one for waiting, and one
or more for each communicator: operations that overlap in time do not fit on one track. An arrow leads from each send to
the receive that took it. The file is written event by event; a trace of any length needs the memory of one rank.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from hpcinfer.observe.trace import COMPUTE, HOST, IDLE, KINDS, TICK, TRANSFER, WAIT, Record
from hpcinfer.observe.trace_analysis import layer_of
from hpcinfer.observe.trace_file import Trace

_TRACKS = {COMPUTE: (0, "compute"), TICK: (1, "host"), HOST: (1, "host"), WAIT: (2, "waiting"), IDLE: (2, "waiting")}
_FIRST_TRANSFER_TRACK = 3
_LEAST_US = 0.001
"""Events of no length are drawn nowhere, and an arrow needs an event to start from."""

Flows = dict[tuple[int, str, str, int], int]
"""(rank, communicator, "send" or "recv", number of the operation) -> id of its arrow."""


def write_chrome(path: Path, traces: Sequence[Trace], *, last_ticks: int = 0) -> int:
    """Write the traces of one start, all on one clock, as a JSON object.

    Args:
        traces: on one clock (`trace_file.on_common_clock`).
        last_ticks: only what belongs to, or lies beside, this many last ticks; 0 for all.

    Returns:
        The number of events.
    """
    first_s = _start_of(traces, last_ticks) if last_ticks else -np.inf
    zero_s = max(first_s, min(trace.header["start_s"] for trace in traces))
    flows = match_flows(traces, first_s)
    with open(path, "w", encoding="utf-8") as file:
        return _write(file, traces, flows, first_s, zero_s)


def match_flows(traces: Sequence[Trace], first_s: float = -np.inf) -> Flows:
    """Ids of arrows: the k-th send from one rank to another on a communicator belongs to its k-th receive there.

    An end whose other end was not recorded, or ended before `first_s`, has no arrow. Where old records were dropped the
    counts of both ends no longer compare; the numbers of operations still do on a link that is used in one direction, as
    all are.
    """
    ends: dict[tuple, list[tuple[int, str, str, int, float]]] = {}
    for trace in traces:
        for record in _point_to_point(trace):
            members = trace.header["communicators"].get(record.track)
            if members is not None and 0 <= record.peer < len(members):
                other = members[record.peer]
                pair = (trace.rank, other) if record.verb == "send" else (other, trace.rank)
                key = (record.track, tuple(members), *pair, record.verb)
                ends.setdefault(key, []).append((trace.rank, record.track, record.verb, record.number, record.end_s))
    ids = itertools.count(1)
    flows: Flows = {}
    dropped = {trace.rank for trace in traces if trace.header["dropped"]}
    for key, sends in ends.items():
        if key[-1] == "send":
            receives = ends.get((*key[:-1], "recv"), [])
            for send, receive in _pairs(sends, receives, by_number=bool(dropped & {key[2], key[3]})):
                if min(send[-1], receive[-1]) > first_s:
                    flows[send[:4]] = flows[receive[:4]] = next(ids)
    return flows


def _pairs(sends: list[tuple], receives: list[tuple], *, by_number: bool) -> Iterator[tuple[tuple, tuple]]:
    sends, receives = sorted(sends, key=_number), sorted(receives, key=_number)
    if not by_number:
        return zip(sends, receives, strict=False)
    numbered = {_number(receive): receive for receive in receives}
    return ((send, numbered[_number(send)]) for send in sends if _number(send) in numbered)


def _number(end: tuple) -> int:
    return end[3]


def _point_to_point(trace: Trace) -> Iterator[Record]:
    verbs = [trace.code("send"), trace.code("recv")]
    mask = (trace["kind"] == TRANSFER) & np.isin(trace["verb"], verbs)
    return (record for record, wanted in zip(trace.records(), mask, strict=True) if wanted)


def _start_of(traces: Sequence[Trace], last_ticks: int) -> float:
    """When the first of the last ticks began, on any rank."""
    newest = max((int(trace["tick"].max()) for trace in traces if len(trace)), default=0)
    starts = [trace["start_s"][trace["tick"] > newest - last_ticks] for trace in traces]
    return min((float(times.min()) for times in starts if len(times)), default=-np.inf)


def _write(file: TextIO, traces: Sequence[Trace], flows: Flows, first_s: float, zero_s: float) -> int:
    head = {"start": traces[0].header["started"], "layout": traces[0].header["layout"]}
    file.write(f'{{"displayTimeUnit": "ms", "otherData": {json.dumps(head)}, "traceEvents": [')
    count = 0
    for trace in traces:
        for event in _rank_events(trace, flows, first_s, zero_s):
            file.write(",\n" if count else "\n")
            file.write(json.dumps(event))
            count += 1
    file.write("\n]}\n")
    return count


def _rank_events(trace: Trace, flows: Flows, first_s: float, zero_s: float) -> Iterator[dict[str, Any]]:
    place = trace.header["coordinates"]
    where = ", ".join(f"{axis} {index}" for axis, index in place.items())
    yield _meta(trace.rank, 0, "process_name", {"name": f"rank {trace.rank} ({where}; {trace.header['host']})"})
    yield _meta(trace.rank, 0, "process_sort_index", {"sort_index": trace.rank})
    tracks = _Tracks()
    events = []
    for record in trace.records():
        if record.end_s > first_s:
            tid = tracks.of(record)
            start_us = (max(record.start_s, first_s) - zero_s) * 1e6
            events += _record_events(record, trace.rank, tid, start_us, (record.end_s - zero_s) * 1e6, flows)
    for tid, name in sorted(tracks.names.items()):
        yield _meta(trace.rank, tid, "thread_name", {"name": name})
        yield _meta(trace.rank, tid, "thread_sort_index", {"sort_index": tid})
    yield from sorted(events, key=lambda event: (event["tid"], event["ts"]))


def _record_events(
    record: Record, rank: int, tid: int, start_us: float, end_us: float, flows: Flows
) -> Iterator[dict[str, Any]]:
    duration_us = max(end_us - start_us, _LEAST_US)
    event = {
        "ph": "X", "pid": rank, "tid": tid, "ts": round(start_us, 3), "dur": round(duration_us, 3),
        "name": _title(record), "cat": KINDS[record.kind], "args": _arguments(record),
    }
    yield event
    flow = flows.get((rank, record.track, record.verb, record.number)) if record.kind == TRANSFER else None
    if flow is not None:
        common = {"pid": rank, "tid": tid, "name": record.track, "cat": "flow", "id": flow}
        if record.verb == "send":
            yield {**common, "ph": "s", "ts": event["ts"]}
        else:
            # The end of a receive is its arrival; just before it, so that the event still encloses the arrow's head.
            end_us = round(event["ts"] + event["dur"] - _LEAST_US, 3)
            yield {**common, "ph": "f", "bp": "e", "ts": max(event["ts"], end_us)}


class _Tracks:
    """Thread ids of one rank: operations of a communicator go to its first track that is free."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self._busy_until: dict[str, list[tuple[int, float]]] = {}

    def of(self, record: Record) -> int:
        """The track of a record; records come in the order of their start."""
        if record.kind != TRANSFER:
            tid, self.names[tid] = _TRACKS[record.kind]
            return tid
        lanes = self._busy_until.setdefault(record.track, [])
        for index, (tid, until_s) in enumerate(lanes):
            if until_s <= record.start_s:
                lanes[index] = (tid, record.end_s)
                return tid
        tid = _FIRST_TRANSFER_TRACK + sum(map(len, self._busy_until.values()))
        lanes.append((tid, record.end_s))
        self.names[tid] = record.track if len(lanes) == 1 else f"{record.track} ({len(lanes)})"
        return tid


def _title(record: Record) -> str:
    if record.kind in (WAIT, IDLE) and record.verb:
        return f"wait {record.track} {record.verb} {record.name}".rstrip()
    if record.kind == TRANSFER:
        return f"{record.verb} {record.name}".rstrip()
    return record.name


def _arguments(record: Record) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    if record.tick >= 0:
        found["tick"] = record.tick
    if record.part >= 0:
        found["part"] = record.part
    if (layer := layer_of(record.name)) is not None:
        found["layer"] = layer[0]
    if record.verb:
        found |= {"axis": record.track, "bytes": record.bytes}
    if record.kind == TRANSFER:
        found["queued_us"] = round((record.start_s - record.issued_s) * 1e6, 3)
        if record.dtype:
            found |= {"dtype": record.dtype, "shape": list(record.shape)}
    if record.peer >= 0:
        found["peer"] = record.peer
    return found


def _meta(pid: int, tid: int, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": tid, "ts": 0, "name": name, "args": arguments}
