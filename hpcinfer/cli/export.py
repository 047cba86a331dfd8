"""Generations to JSON Lines, CSV, Parquet or OpenAI's batch output, in the order of the rows.

SOURCE is a generations.h5, a segment, or a run directory. DEST "-" writes to standard output. Columns of the input (ids, meta
columns, the prompt) are added on request. With --partial a run that is not complete is exported as far as it is, also while it
goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from hpcinfer.errors import ExitCode, UsageError
from hpcinfer.units import counted


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `hpcinfer export`."""
    parser.add_argument("source", metavar="SOURCE", help="generations file or run directory")
    parser.add_argument("destination", metavar="DEST", help='file to write, or "-"')
    parser.add_argument(
        "--format", default="", metavar="NAME",
        help="jsonl, csv, parquet (default: by DEST's name, else jsonl), or openai: responses to DEST, the rest to --errors",
    )  # fmt: skip
    parser.add_argument("--partial", action="store_true", help="of a run that is not complete: what is there")
    parser.add_argument("--token-ids", action="store_true", help="add the generated token ids")
    parser.add_argument("--ids", action="store_true", help="add each row's id in the prompts")
    parser.add_argument("--prompt-text", action="store_true", help="add the prompt itself")
    parser.add_argument("--meta-columns", default="none", metavar="NAMES", help="add meta columns: all, none, or names with commas")
    parser.add_argument(
        "--prompts", default="", metavar="FILE", help="the prompts that were run (default: those that the run directory names)"
    )
    parser.add_argument("--dataset", default="", metavar="NAME", help="where the prompts are in a foreign layout")
    parser.add_argument("--errors", default="", metavar="FILE", help="openai: the error file (default: DEST with .errors in its name)")
    parser.add_argument(
        "--model", default="", metavar="FOLDER", help="openai: where the tokenizer is, for log-probabilities (default: the run's model)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what exists")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")


def execute(args: argparse.Namespace) -> int:
    """Exports, and prints what came of it. Returns 0."""
    from hpcinfer.data.export import ExportOptions, export

    to_stdout = args.destination == "-"
    if to_stdout and args.json:
        raise UsageError("--json has no place beside an export to standard output", fix="give a file as DEST")
    names = [field.name for field in dataclasses.fields(ExportOptions)]
    options = ExportOptions(**{name: getattr(args, name) for name in names})
    destination = sys.stdout.buffer if to_stdout else args.destination
    summary = export(
        args.source, destination, options, overwrite=args.overwrite, say=lambda text: print(text, file=sys.stderr, flush=True)
    )
    if to_stdout:
        sys.stdout.buffer.flush()
    elif args.json:
        print(json.dumps(dataclasses.asdict(summary)))
    else:
        what = "response" if summary.errors else "generation"
        print(f"{summary.destination}: {counted(summary.num_rows, what)} of {summary.source}")
        if summary.errors:
            print(f"{summary.errors}: {counted(summary.num_errors, 'line')} without a response")
        if not summary.complete:
            print("the source does not hold every row of its run")
    return ExitCode.DONE
