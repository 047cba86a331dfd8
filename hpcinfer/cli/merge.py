"""Merge the committed segments of a run into one file, sorted by row. A complete run does it by itself at its end."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from hpcinfer.errors import ExitCode


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `hpcinfer merge`."""
    parser.add_argument("run", metavar="RUN_DIR", help="run directory (data.output of the job)")
    parser.add_argument("output", metavar="OUT.h5", nargs="?", default=None, help="default: generations.h5 in RUN_DIR")
    parser.add_argument("--partial", action="store_true", help="merge what there is, although rows are missing; needs OUT.h5")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def execute(args: argparse.Namespace) -> int:
    """Merges. Returns 0 when every row is in the output, 3 when some are missing."""
    from hpcinfer.data.ledger.coverage import BadSegments
    from hpcinfer.data.ledger.merge import merge_run
    from hpcinfer.data.ledger.run_directory import open_existing
    from hpcinfer.data.ledger.status import read_status
    from hpcinfer.errors import UsageError

    if args.partial and args.output is None:
        raise UsageError("--partial needs a name for its output", fix="hpcinfer merge RUN_DIR OUT.h5 --partial")
    run = open_existing(args.run)
    status = read_status(run, exact=True)
    bad_segments = BadSegments(run, say=lambda text: print(text, file=sys.stderr, flush=True))
    result = merge_run(run, status.num_rows, args.output, allow_partial=args.partial, bad_segments=bad_segments)
    if args.json:
        print(json.dumps({**dataclasses.asdict(result), "path": str(result.path)}))
    else:
        print(
            f"{result.path}: {result.num_ok} ok, {result.num_failed} failed, {result.num_partial} partial, "
            f"{result.num_missing} missing of {result.num_keys}"
        )
    return ExitCode.DONE if result.complete else ExitCode.RESUMABLE
