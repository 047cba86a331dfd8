"""When a replica stops beginning rows, and when it stops waiting for those that it has begun."""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Callable

from hpcinfer.launch.signals import DrainFlag

UNKNOWN_S = 5.0
"""What rows in work may take after a signal where nothing says how long there is: launchers kill some 30 s after SIGTERM."""
_LARGEST_SHARE = 1 / 8
"""Neither the margin nor the drain before it, where no signal comes, takes more of the time that the job has left when rows begin: a
short job would do nothing else."""


class Phase(enum.Enum):
    """What a leader does."""

    RUN = "run"
    """Rows are begun."""
    DRAIN = "drain"
    """Those in work go on; nothing is begun."""
    CUT = "cut"
    """Those in work are cut short, and kept as partial rows."""


class DrainPlan:
    """Goes from RUN to DRAIN to CUT, never back.

    A drain begins by a signal, or by itself when the job's end is near. Rows in work may then go on: for `drain_s` where it is
    given; else as long as the job lasts, without the margin; for `UNKNOWN_S` where that is not known, and after SIGTERM. A second
    signal ends the waiting.

    Args:
        flag: set by signals; the plan sets it where a drain begins by itself.
        drain_s: `run.drain_s`; None leaves it to what is known.
        margin_s: `run.margin_s`: kept free before the job's end. Where no signal comes, a drain begins before it by `drain_s`, or
            by the margin once more.
        left_s: seconds until the job's end; None where there is none, or it is not known.
        clock: seconds.
    """

    def __init__(
        self,
        flag: DrainFlag,
        *,
        drain_s: float | None,
        margin_s: float,
        left_s: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._flag = flag
        self._drain_s = drain_s
        self._clock = clock
        most_s = math.inf if left_s is None else max(0.0, left_s * _LARGEST_SHARE)
        self._latest = math.inf if left_s is None else clock() + left_s - min(margin_s, most_s)
        self._begins = self._latest - min(margin_s if drain_s is None else drain_s, most_s)
        self._cut_at = self._latest

    @property
    def reason(self) -> str:
        """Why it drains."""
        return self._flag.reason

    @property
    def left_s(self) -> float:
        """Seconds until what is in work is cut short; inf while nothing asks for a drain and the job's end is not known."""
        return max(0.0, self._cut_at - self._clock())

    def phase(self) -> Phase:
        """The phase now. Cheap: it is asked for in every tick. Raises KeyboardInterrupt where an earlier one got lost."""
        if self._flag.is_interrupted:
            raise KeyboardInterrupt
        now = self._clock()
        if now >= self._begins and not self._flag:
            self._flag.ask("the end of the job's time")
        if not self._flag:
            return Phase.RUN
        self._cut_at = min(self._cut_at, now + self._allowed_s(now))
        return Phase.CUT if now >= self._cut_at else Phase.DRAIN

    def _allowed_s(self, now: float) -> float:
        if self._flag.is_repeated:
            return 0.0
        if self._drain_s is not None:
            return self._drain_s
        if self._flag.is_urgent or self._latest == math.inf:
            return UNKNOWN_S
        return self._latest - now
