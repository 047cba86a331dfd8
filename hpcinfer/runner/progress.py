"""How far loading is; how far a whole run is, from one rank's own figures and the heartbeats of all other writers."""

from __future__ import annotations

import contextlib
import logging
import time

from hpcinfer.data.ledger.run_directory import RunDirectory, storage_errors
from hpcinfer.data.ledger.writers import read_heartbeat, writer_ids
from hpcinfer.models.weights import LoadFigures
from hpcinfer.observe.progress import ProgressBar, ProgressPoint
from hpcinfer.runner.forecast import Forecast
from hpcinfer.runner.replica_loop import LoopFigures

_OTHERS_S = 2.0
_LOADING_S = 5.0


class LoadProgress:
    """Says every few seconds how far the weights of a start are.

    Args:
        log: where it says so; None for nowhere.
    """

    def __init__(self, log: logging.Logger | None) -> None:
        self.figures = LoadFigures()
        """The newest."""
        self._log = log
        self._next_s = _LOADING_S

    def update(self, figures: LoadFigures) -> None:
        """Take figures; say so if it is time to."""
        self.figures = figures
        if self._log is not None and figures.seconds >= self._next_s:
            self._next_s = figures.seconds + _LOADING_S
            self._log.info(
                "weights %s of %s, %s/s", _gigabytes(figures.done_bytes), _gigabytes(figures.total_bytes),
                _gigabytes(figures.done_bytes / figures.seconds),
            )

    def total(self) -> str:
        """What was loaded, and how fast."""
        done, seconds = self.figures.done_bytes, max(self.figures.seconds, 1e-9)
        return f"weights of {_gigabytes(done)}, {_gigabytes(done / seconds)}/s"


class RunProgress:
    """Feeds a progress bar and a forecast, and says what there is to say without tearing the bar.

    Args:
        bar: where it is shown; None for nowhere.
        forecast: told now and then; None for nobody.
        log: of this rank.
        run: the run directory.
        own_id: this replica's writer, whose figures come from memory.
        rows_total: output rows of the run.
        rows_done: output rows done before this start.
        known: writers of earlier lives, whose rows are in `rows_done` already; read by `earlier_writers`.
        tokens: which of them are shown: the name of a figure of loops and heartbeats.
    """

    def __init__(
        self,
        bar: ProgressBar | None,
        forecast: Forecast | None,
        log: logging.Logger,
        run: RunDirectory,
        *,
        own_id: str,
        rows_total: int,
        rows_done: int,
        known: dict[str, dict],
        tokens: str = "output_tokens",
    ) -> None:
        self._bar = bar
        self._forecast = forecast
        self._log = log
        self._run = run
        self._own_id = own_id
        self._total = rows_total
        self._before = rows_done
        self._known = known
        self._tokens = tokens
        self._others = (0, 0, 0)
        self._read_at = float("-inf")

    def update(self, figures: LoopFigures, *, force: bool = False) -> None:
        """Show where the run is, if it is time to."""
        if self._bar is None and self._forecast is None:
            return
        is_time = time.monotonic() - self._read_at > _OTHERS_S
        if is_time:
            try:
                self._others = self._read_others()
            except OSError:
                pass  # a display may miss a heartbeat that is just being replaced
            self._read_at = time.monotonic()
        rows, failed, tokens = self._others
        point = ProgressPoint(
            # Two writers may have run the same row once in a while: never show more than there is.
            rows_done=min(self._total, self._before + figures.rows + rows),
            rows_total=self._total,
            tokens=getattr(figures, self._tokens) + tokens,
            rows_failed=figures.failed + failed,
        )
        if self._forecast is not None and is_time and (warning := self._forecast.update(point.rows_done, point.rows_total)):
            self.say(warning)
        if self._bar is not None:
            self._show(point, force=force)

    def _show(self, point: ProgressPoint, *, force: bool) -> None:
        try:
            self._bar.update(point, force=force)
        except OSError:
            self._bar = None  # nobody can see it: a full disk, a closed pipe

    def say(self, text: str) -> None:
        """Log a line, on a line of its own."""
        self.close()
        self._log.info(text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()

    def _read_others(self) -> tuple[int, int, int]:
        sums = [0, 0, 0]
        for writer_id in writer_ids(self._run):
            if writer_id != self._own_id:
                before = self._known.get(writer_id, {})
                beat = read_heartbeat(self._run, writer_id)
                for index, name in enumerate(("rows_ended", "rows_ended_failed", self._tokens)):
                    sums[index] += int(beat.get(name, 0)) - int(before.get(name, 0))
        return sums[0], sums[1], sums[2]


def earlier_writers(run: RunDirectory) -> dict[str, dict]:
    """The heartbeats of all writers that are there now: writer id -> figures. Raises RunDirectoryError, ResumableError."""
    with storage_errors(run.path):
        return {writer_id: read_heartbeat(run, writer_id) for writer_id in writer_ids(run)}


def _gigabytes(num_bytes: float) -> str:
    """In powers of ten, as networks and file systems are rated."""
    return f"{num_bytes / 1e9:.{1 if num_bytes >= 1e8 else 3}f} GB"
