"""Which writers hold the others up.

A writer at work straggles if
- its heartbeat has stood still for `STILL_BEATS` of its intervals and `STILL_S`: a step hangs, or its node is cut off; or
- it generates less than `SLOW_SHARE` of the tokens a second that the median of all that run does, in the last minutes. Only writers
  that have been running for `WARM_S` count, and there must be two of them. Writers of different layouts or hardware are compared
  as they are: what is slow is slow.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Protocol

from hpcinfer.units import format_duration, format_rate

STILL_BEATS = 6
STILL_S = 30.0
SLOW_SHARE = 0.5
WARM_S = 60.0


class Working(Protocol):
    """What is looked at: a `status.WriterStatus`."""

    id: str
    state: str
    beat_age_s: float
    beat_interval_s: float
    running_s: float
    output_tokens_per_s: float


def find_stragglers(writers: Iterable[Working]) -> dict[str, str]:
    """Of writers that may be at work: id of each straggler -> why."""
    writers = list(writers)
    found = {
        writer.id: f"no heartbeat for {format_duration(writer.beat_age_s)}"
        for writer in writers
        if STILL_S < writer.beat_age_s < float("inf") and writer.beat_age_s > STILL_BEATS * writer.beat_interval_s
        and writer.state in ("running", "draining", "merging", "idle")
    }
    running = [writer for writer in writers if writer.state == "running" and writer.running_s >= WARM_S]
    if len(running) >= 2:
        median = statistics.median(writer.output_tokens_per_s for writer in running)
        for writer in running:
            if writer.output_tokens_per_s < SLOW_SHARE * median:
                why = f"{format_rate(writer.output_tokens_per_s)} tokens/s, the median of {len(running)} is {format_rate(median)}"
                found.setdefault(writer.id, why)
    return found
