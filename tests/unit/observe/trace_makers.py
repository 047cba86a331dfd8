"""Traces made by hand, for tests of what reads them."""

from __future__ import annotations

from pathlib import Path

from hpcinfer.observe.trace import COMPUTE, TRANSFER, WAIT, Recorder
from hpcinfer.observe.trace_file import Trace, load_trace, save_trace

HEADER = {
    "rank": 0, "num_ranks": 2, "host": "node0", "boot_id": "a", "started": "20260101T000000", "layout": "dp 1 x pp 1 x sp 1 x tp 2",
    "coordinates": {"replica": 0, "stage": 0, "lane": 0, "tp": 0}, "communicators": {"tp": [0, 1], "control": [0, 1]},
    "start_s": 100.0, "end_s": 200.0, "start_unix_s": 0.0, "end_unix_s": 100.0, "clock": [], "same_clock": True,
    "complete": True, "versions": {},
}


def make_trace(folder: Path, records: list[tuple], **header) -> Trace:
    """A trace with these records, written and read back."""
    recorder = Recorder()
    for record in records:
        recorder._kept.append(record)
    return load_trace(save_trace(folder, recorder, {**HEADER, **header}))


def segment(start_s: float, end_s: float, *, tick: int = 0, part: int = 0, name: str = "layer 0 o") -> tuple:
    return (COMPUTE, "", name, start_s, end_s, tick, part)


def transfer(
    start_s: float, end_s: float, *, track: str = "tp", verb: str = "all_reduce", tick: int = 0, num_bytes: int = 8,
    peer: int = -1, number: int = 1, issued_s: float | None = None,
) -> tuple:
    issued_s = start_s if issued_s is None else issued_s
    return (
        TRANSFER, track, "layer 0 o", start_s, end_s, tick, 0, verb, num_bytes, peer, issued_s, number, "float32", (2, 1)
    )


def wait(start_s: float, end_s: float, *, track: str = "tp", tick: int = 0, kind: int = WAIT) -> tuple:
    return (kind, track, "layer 0 o", start_s, end_s, tick, 0, "all_reduce", 8)
