"""Logs: a file for every rank in the run directory, and a short console from rank 0."""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path

_FILE_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s"
_TIME_FORMAT = "%Y-%m-%dT%H:%M:%S"


class _QuietFileHandler(logging.FileHandler):
    """A log that cannot be written (full disk, folder removed) must neither end a run nor hide why it ended."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class _QuietConsole(logging.StreamHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        pass


def rank_log(rank: int, host: str, *, file: Path | None = None, console: bool = False) -> logging.Logger:
    """A logger of one rank; it belongs to its caller and is not in the logging module's global tree.

    Args:
        rank: world rank, for the name.
        host: host name, for the name.
        file: where everything is written; None for nowhere.
        console: also print messages, without a prefix and without tracebacks, to stderr.
    """
    log = logging.Logger(f"rank {rank} on {host}", logging.INFO)
    if file is not None:
        handler = _QuietFileHandler(file, encoding="utf-8", delay=True)
        handler.setFormatter(logging.Formatter(_FILE_FORMAT, _TIME_FORMAT))
        log.addHandler(handler)
    if console:
        handler = _QuietConsole(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        handler.addFilter(lambda record: record.exc_info is None)  # errors have a report of their own (launch.report)
        log.addHandler(handler)
    if not log.handlers:
        log.addHandler(logging.NullHandler())
    return log


def close_log(log: logging.Logger) -> None:
    """Close the files of a logger made by `rank_log`."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
