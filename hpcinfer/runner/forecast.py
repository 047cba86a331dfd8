"""Whether a run will be over before its job is: said early, and not again and again."""

from __future__ import annotations

import time
from collections.abc import Callable

from hpcinfer.observe.metrics import RateMeter
from hpcinfer.units import format_count, format_duration, format_rate

_WINDOW_S = 600.0
"""The rate is that of so long."""
_LEAST_ROWS = 20
_LEAST_S = 60.0
_LEAST_SHARE = 1 / 20
"""A rate is believed after so many rows, and so long: a minute, or this share of the time that the job has left if that is less."""
_TOLERANCE = 1.1
"""The work must exceed the time by this factor: rates vary."""
_CHANGE = 1.5
"""It is said again when the number of rows that will be missing has changed by this factor."""


class Forecast:
    """Compares what is left to do with the time left, at the rate of all writers of the run together.

    The rate counts from the first row that ends after the start: what loading and the first long rows took will not be needed again.

    Args:
        left_s: seconds until the job's end.
        clock: seconds.
    """

    def __init__(self, *, left_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + left_s
        self._least_s = min(_LEAST_S, left_s * _LEAST_SHARE)
        self._rate = RateMeter(_WINDOW_S, spacing_s=_WINDOW_S / 100)
        self._start_rows: int | None = None
        self._first: tuple[float, int] | None = None
        self._said = 0.0

    def update(self, rows_done: int, rows_total: int) -> str:
        """Take figures of the whole run; return a warning if it will not be over in time, and "" otherwise."""
        now = self._clock()
        if self._start_rows is None:
            self._start_rows = rows_done
        if rows_done == self._start_rows:
            return ""
        self._first = self._first or (now, rows_done)
        rate, left_s = self._rate.update(now, rows_done), self._end - now
        if now - self._first[0] < self._least_s or rows_done - self._first[1] < _LEAST_ROWS or rate <= 0 or left_s <= 0:
            return ""
        needed_s = (rows_total - rows_done) / rate
        missing = (needed_s - left_s) * rate
        if needed_s < _TOLERANCE * left_s or (self._said and 1 / _CHANGE < missing / self._said < _CHANGE):
            return ""
        self._said = missing
        return (
            f"{format_count(rows_total - rows_done)} rows are left; at the present {format_rate(rate)} rows/s they take "
            f"{format_duration(needed_s)}, and the job ends in {format_duration(left_s)}, with about {format_count(round(missing))} missing "
            "(exit code 3). Requeued or started again it goes on; more nodes, or more tasks of a job array on this run directory, end "
            "sooner."
        )
