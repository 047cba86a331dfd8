"""What is in a file of prompts or generations, in a run directory, or in any HDF5 file: rows, columns, first rows."""

from __future__ import annotations

import argparse
import dataclasses
import json

from hpcinfer.errors import ExitCode, UsageError


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `hpcinfer inspect`."""
    parser.add_argument("path", metavar="FILE", help="file, folder of shards, or run directory")
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="first rows to show (default: %(default)s)")
    parser.add_argument("--dataset", default="", metavar="NAME", help="where the prompts are in a foreign layout")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def execute(args: argparse.Namespace) -> int:
    """Prints the description. Returns 0."""
    from hpcinfer.data.inspect import describe, render

    if args.rows < 0:
        raise UsageError(f"--rows {args.rows}", fix="give 0 or more")
    description = describe(args.path, num_rows=args.rows, dataset=args.dataset or None)
    print(json.dumps(dataclasses.asdict(description)) if args.json else render(description))
    return ExitCode.DONE
