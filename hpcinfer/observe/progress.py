"""The progress of a run, for the person who started it: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import dataclasses
import time
from typing import TextIO

from hpcinfer.observe.metrics import RateMeter
from hpcinfer.units import format_count, format_duration

_BAR_WIDTH = 24
_TERMINAL_S = 0.2
_LOG_S = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProgressPoint:
    """How far a whole run is, all its writers together."""

    rows_done: int
    """Output rows ended, failed ones included."""
    rows_total: int
    tokens: int
    """Output tokens generated since this start."""
    rows_failed: int = 0


class ProgressBar:
    """Shows points on `stream`; redraws in place on a terminal, writes a line every ten seconds elsewhere."""

    def __init__(self, stream: TextIO, clock=time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._terminal = stream.isatty()
        self._interval_s = _TERMINAL_S if self._terminal else _LOG_S
        self._rows = RateMeter()
        self._tokens = RateMeter()
        self._last_s = float("-inf")
        self._open = False

    def update(self, point: ProgressPoint, *, force: bool = False) -> None:
        """Show `point` if it is time to, or if `force`."""
        now = self._clock()
        if not force and now - self._last_s < self._interval_s:
            return
        self._last_s = now
        line = progress_line(point, self._rows.update(now, point.rows_done), self._tokens.update(now, point.tokens))
        self._stream.write(f"\r\x1b[2K{line}" if self._terminal else f"{line}\n")
        self._stream.flush()
        self._open = self._terminal

    def close(self) -> None:
        """Leave the terminal on a fresh line."""
        if self._open:
            self._stream.write("\n")
            self._stream.flush()
        self._open = False


def progress_line(point: ProgressPoint, rows_per_s: float, tokens_per_s: float) -> str:
    """One line: bar, rows, rates, remaining time."""
    share = point.rows_done / point.rows_total if point.rows_total else 1.0
    filled = int(share * _BAR_WIDTH)
    left = point.rows_total - point.rows_done
    eta_s = 0.0 if left == 0 else left / rows_per_s if rows_per_s > 0 else float("inf")
    failed = f", {format_count(point.rows_failed)} failed" if point.rows_failed else ""
    return (
        f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {100 * share:5.1f} %  "
        f"{format_count(point.rows_done)}/{format_count(point.rows_total)} rows{failed}  "
        f"{format_count(rows_per_s)} rows/s  {format_count(tokens_per_s)} tokens/s  ETA {format_duration(eta_s)}"
    )
