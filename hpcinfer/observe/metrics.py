"""Where a rank's time goes, by phase."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

PHASES = ("load", "prefill", "decode", "communication", "io")
"""Phases of the summary. What they leave of the wall time is waiting: for other stages, for work, for the end."""


class PhaseClock:
    """Seconds spent in each phase by one rank."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)

    def add(self, phase: str, seconds: float) -> None:
        """Count `seconds` towards one of PHASES."""
        self.seconds[phase] += seconds

    @contextlib.contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        """Count the time inside towards `phase`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, time.perf_counter() - start)


class RateMeter:
    """A rate over the last `window_s` seconds, for progress displays. It keeps a point every `spacing_s` seconds."""

    def __init__(self, window_s: float = 30.0, *, spacing_s: float = 0.0) -> None:
        self._window_s = window_s
        self._spacing_s = spacing_s
        self._points: list[tuple[float, float]] = []

    def update(self, now_s: float, total: float) -> float:
        """Note that `total` units were done by `now_s`; return units per second over the window (0 at first)."""
        if not self._points or now_s - self._points[-1][0] >= self._spacing_s:
            self._points.append((now_s, total))
        while len(self._points) > 2 and now_s - self._points[1][0] >= self._window_s:
            self._points.pop(0)
        (start_s, start_total) = self._points[0]
        return (total - start_total) / (now_s - start_s) if now_s > start_s else 0.0
