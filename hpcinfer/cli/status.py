"""How far a run is: rows, rates, and every writer with its last sign of life. Reads files only, and needs no model.

Rates "now" are of the last two minutes of the writers that live, "overall" since the run was created. A straggler is a writer whose
heartbeat stands still for half a minute and more, or that generates less than half of the tokens a second that the median does.

Exit codes: 0 every row is in generations.h5, 3 not yet.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from hpcinfer.errors import ExitCode, ResumableError, UsageError

_CLEAR = "\x1b[H\x1b[2J\x1b[3J"
_SHORTEST_S, _LONGEST_S = 0.1, 86400
"""Between two looks of a watch."""
_SHOWN = 20
"""So many writers are shown whatever they do; of more, those that may be at work."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `hpcinfer status`."""
    parser.add_argument("run", metavar="RUN_DIR", help="run directory (data.output of the job)")
    parser.add_argument("--watch", action="store_true", help="look again and again, until the run is complete or Ctrl-C")
    parser.add_argument(
        "--every", type=float, default=5.0, metavar="SECONDS", help="with --watch: time between two looks (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object (with --watch one a line)")


def execute(args: argparse.Namespace) -> int:
    """Prints the status. Returns 0 when the run is complete, 3 when it is not."""
    from hpcinfer.data.ledger.run_directory import open_existing
    from hpcinfer.data.ledger.status import StatusReader

    if not _SHORTEST_S <= args.every <= _LONGEST_S:
        raise UsageError(f"--every {args.every:g}", fix=f"give {_SHORTEST_S} to {_LONGEST_S} seconds")
    reader = StatusReader(open_existing(args.run))
    if args.watch:
        return watch(reader, sys.stdout, every_s=args.every, as_json=args.json)
    status = reader.read()
    print(to_json(status) if args.json else to_text(status))
    return ExitCode.DONE if status.complete else ExitCode.RESUMABLE


def watch(
    reader, stream: TextIO, *, every_s: float, as_json: bool = False, sleep: Callable[[float], None] = time.sleep
) -> int:
    """Show the status again and again: drawn anew on a terminal, a line each time elsewhere. Returns the exit code."""
    redraw = stream.isatty() and not as_json
    code = ExitCode.RESUMABLE
    try:
        while True:
            try:
                status = reader.read()
            except ResumableError as error:  # of the file system, for a moment
                print(f"hpcinfer: {error}", file=sys.stderr, flush=True)
                sleep(every_s)
                continue
            code = ExitCode.DONE if status.complete else ExitCode.RESUMABLE
            if redraw:
                stream.write(f"{_CLEAR}{to_text(status)}\n")
            else:
                stream.write(f"{to_json(status) if as_json else to_line(status)}\n")
            stream.flush()
            if status.complete:
                return code
            sleep(every_s)
    except KeyboardInterrupt:  # how a watch is ended
        return code


def to_json(status) -> str:
    """One JSON object, without infinities: null is unknown."""
    return json.dumps(_plain({**dataclasses.asdict(status), "eta_s": status.eta_s}))


def to_line(status) -> str:
    """A line with the figures of the whole run."""
    from hpcinfer.units import counted, format_count, format_duration, format_rate

    num_ended = status.num_done + status.num_failed
    live = sum(writer.is_active for writer in status.writers)
    stragglers = [f"straggler {writer.id}: {writer.straggles}" for writer in status.writers if writer.straggles]
    parts = [
        f"{time.strftime('%H:%M:%S')} {format_count(num_ended)}/{format_count(status.num_total)} rows",
        f"{format_count(status.num_failed)} failed", f"{format_rate(status.rows_per_s)} rows/s",
        f"{format_rate(status.output_tokens_per_s)} tokens/s", counted(live, "writer"), f"ETA {format_duration(status.eta_s)}", *stragglers,
    ]
    return ", ".join([*parts, "complete"] if status.complete else parts)


def to_text(status) -> str:
    """A few lines, and a table of the writers."""
    from hpcinfer.units import counted, format_count, format_duration, format_rate

    exact = "" if status.exact else "  (from heartbeats)"
    lines = [
        f"{status.path}: {'complete' if status.complete else 'not complete'}",
        f"  rows      {format_count(status.num_total)} in all: {format_count(status.num_done)} ok, "
        f"{format_count(status.num_failed)} failed, {format_count(status.num_partial)} partial, "
        f"{format_count(status.num_claimed)} claimed, {format_count(status.num_left)} left{exact}{_round(status)}",
        f"  rate      {format_rate(status.rows_per_s)} rows/s and {format_rate(status.output_tokens_per_s)} tokens/s now, "
        f"{format_rate(status.rows_per_s_overall)} rows/s overall",
        f"  to go     {format_count(status.num_to_do)} rows, ETA {format_duration(status.eta_s)}",
        f"  output    {status.output or _unmerged(status.path)} ({counted(status.num_segments, 'segment')}, {status.num_bad_segments} bad)",
        *_writers(status.writers),
    ]
    lines += [
        f"  straggler {writer.id} ({_job(writer)}{writer.identity.host}): {writer.straggles}"
        for writer in status.writers
        if writer.straggles
    ]
    return "\n".join(lines)


def _unmerged(path) -> str:
    trial = Path(path) / "trial.h5"
    return f"not merged yet; what a trial left is {trial}" if trial.exists() else "not merged yet"


def _round(status) -> str:
    return f"  (failed rows tried again: round {status.retry_round})" if status.retry_round else ""


def _writers(writers) -> list[str]:
    from hpcinfer.units import format_count, format_duration, format_rate

    shown = writers if len(writers) <= _SHOWN else [writer for writer in writers if writer.is_active]
    rows = [("writer", "job", "node", "layout", "state", "ok", "rows/s", "tokens/s", "heartbeat", "restarts")]
    for writer in shown:
        runs = writer.is_active and writer.state == "running"
        rows.append((
            writer.id, writer.identity.job or "-", writer.identity.host, writer.identity.layout or writer.identity.role, _state(writer),
            format_count(writer.num_ok), format_rate(writer.rows_per_s) if runs else "-",
            format_rate(writer.output_tokens_per_s) if runs else "-", f"{format_duration(writer.beat_age_s)} ago",
            str(writer.identity.restart_count),
        ))  # fmt: skip
    columns = [[cell.rjust(max(map(len, column))) for cell in column] for column in zip(*rows, strict=True)]
    columns[:5] = [[cell.strip().ljust(len(cell)) for cell in column] for column in columns[:5]]
    table = ["  " + "  ".join(row) for row in zip(*columns, strict=True)]
    hidden = len(writers) - len(shown)
    return [*(table if shown else []), *([f"  {hidden} writers that left or died are not shown (--json has them)"] if hidden else [])]


def _state(writer) -> str:
    """What it does; what can be told about it where that is something else."""
    if writer.verdict.value == "left":
        return f"left: {writer.reason}" if writer.reason else "left"
    return writer.state or "no heartbeat" if writer.verdict.value == "live" else writer.verdict.value


def _job(writer) -> str:
    return f"job {writer.identity.job}, " if writer.identity.job else ""


def _plain(value):
    """What JSON can hold: no paths, enums or infinities."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "value", str(value))
