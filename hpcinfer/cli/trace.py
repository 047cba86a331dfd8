"""What every rank of a traced start did when (`hpcinfer run --trace`): a table, and a JSON file for ui.perfetto.dev.

For each rank: wall time, computation and host work, exposed communication (the rank computed nothing meanwhile), idling,
and what no record explains. For each axis of the mesh: operations and bytes a step, time in transfer, exposed time. For
each stage the bubble: its share of time without computation or communication of its own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hpcinfer.errors import ExitCode, UsageError


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `hpcinfer trace`."""
    parser.add_argument("run", metavar="RUN_DIR", help="run directory (data.output of the job)")
    parser.add_argument("--out", default="", metavar="FILE", help="the JSON file (default: RUN_DIR/trace/START.json)")
    parser.add_argument("--start", default="", metavar="NAME", help="which start of the run (default: the newest)")
    parser.add_argument(
        "--last", type=int, default=0, metavar="N", help="only the last N ticks in the JSON file (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="print the table as one JSON object")


def execute(args: argparse.Namespace) -> int:
    """Prints the table and writes the file. Returns 0."""
    from hpcinfer.data.hdf5 import whole_file
    from hpcinfer.observe.trace_analysis import analyse, to_plain
    from hpcinfer.observe.trace_chrome import write_chrome
    from hpcinfer.observe.trace_file import load_start, on_common_clock

    if args.last < 0:
        raise UsageError(f"--last {args.last}", fix="give 0 (all) or more")
    folder = Path(args.run) / "trace"
    traces = [on_common_clock(trace) for trace in load_start(folder, args.start)]
    report = analyse(traces)
    out = Path(args.out or folder / f"{report.start}.json")
    with whole_file(out) as temporary:
        num_events = write_chrome(temporary, traces, last_ticks=args.last)
    if args.json:
        print(json.dumps({**to_plain(report), "out": str(out), "events": num_events}))
    else:
        print(_text(report))
        print(f"{num_events:,} events in {out}: open it in ui.perfetto.dev or chrome://tracing")
    return ExitCode.DONE


def _text(report) -> str:
    lines = [f"start {report.start}, {report.layout}", ""]
    lines += _table(
        ("rank", "stage", "wall s", "compute", "segments", "exposed", "idle", "other", "steps"),
        [
            (rank.rank, rank.stage, f"{rank.wall_s:.3f}", _share(rank.compute_s, rank), _share(rank.segments_s, rank),
             _share(rank.exposed_s, rank), _share(rank.idle_s, rank), _share(rank.other_s, rank), rank.steps)
            for rank in report.ranks
        ],
    )
    lines += ["", *_table(
        ("axis", "ranks", "operations/step", "bytes/step", "transfer s", "exposed s"),
        [
            (axis.axis, axis.ranks, f"{axis.operations_per_step:.2f}", f"{axis.bytes_per_step:,.0f}",
             f"{axis.transfer_s:.3f}", f"{axis.exposed_s:.3f}")
            for axis in report.axes
        ],
    )]
    lines += ["", *_table(
        ("replica", "stage", "window s", "bubble"),
        [(stage.replica, stage.stage, f"{stage.window_s:.3f}", f"{stage.bubble:.1%}") for stage in report.stages],
    )]
    if report.missing:
        lines += ["", f"ranks without a trace, which the figures leave out: {', '.join(map(str, report.missing))}"]
    if any(rank.dropped for rank in report.ranks):
        lines += ["", "there were more records than are kept: the oldest are missing"]
    return "\n".join(lines)


def _share(seconds: float, rank) -> str:
    return f"{seconds:.3f} {seconds / max(rank.wall_s, 1e-9):6.1%}"


def _table(head: tuple, rows: list[tuple]) -> list[str]:
    cells = [tuple(map(str, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
