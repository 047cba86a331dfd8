"""How far a run is: rows, rates, and every writer with its last sign of life. Reads files only, and needs no model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math

from hpcinfer.errors import ExitCode


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `hpcinfer status`."""
    parser.add_argument("run", metavar="RUN_DIR", help="run directory (data.output of the job)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def execute(args: argparse.Namespace) -> int:
    """Prints the status. Returns 0 when the run is complete, 3 when it is not."""
    from hpcinfer.data.ledger.status import read_status

    status = read_status(args.run)
    print(json.dumps(_plain(dataclasses.asdict(status))) if args.json else _text(status))
    return ExitCode.DONE if status.complete else ExitCode.RESUMABLE


def _text(status) -> str:
    from hpcinfer.units import format_count, format_duration

    exact = "" if status.exact else "  (from heartbeats)"
    lines = [
        f"{status.path}: {'complete' if status.complete else 'not complete'}",
        f"  rows     {format_count(status.num_total)} in all: {format_count(status.num_done)} ok, "
        f"{format_count(status.num_failed)} failed, {format_count(status.num_partial)} partial, "
        f"{format_count(status.num_claimed)} claimed, {format_count(status.num_left)} left{exact}",
        f"  rate     {format_count(status.rows_per_s)} rows/s, {format_count(status.output_tokens_per_s)} tokens/s, "
        f"ETA {format_duration(status.eta_s)}",
        f"  output   {status.output or 'not merged yet'} ({status.num_segments} segments, {status.num_bad_segments} bad)",
    ]
    for writer in status.writers:
        place = f"job {writer.identity.job}, " if writer.identity.job else ""
        lines.append(
            f"  writer   {writer.id} {writer.verdict.value}: {writer.state or 'no heartbeat'}, {place}{writer.identity.host}, "
            f"{writer.identity.layout or writer.identity.role}, {format_count(writer.num_ok)} ok, "
            f"{format_count(writer.rows_per_s)} rows/s, last heartbeat {format_duration(writer.beat_age_s)} ago"
        )
    return "\n".join(lines)


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
