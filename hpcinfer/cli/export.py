"""Generations to JSON Lines: one object a generation, in the order of the rows.

SOURCE is a generations.h5, a segment, or a run directory. DEST "-" writes to standard output.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from hpcinfer.errors import ExitCode, UsageError
from hpcinfer.units import format_count


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `hpcinfer export`."""
    parser.add_argument("source", metavar="GENERATIONS.h5", help="generations file or run directory")
    parser.add_argument("destination", metavar="DEST.jsonl", help='file to write, or "-"')
    parser.add_argument("--token-ids", action="store_true", help="add the generated token ids")
    parser.add_argument("--prompts", default="", metavar="FILE", help="the prompts that were run: adds each row's id")
    parser.add_argument("--dataset", default="", metavar="NAME", help="where the prompts are in a foreign layout")
    parser.add_argument("--prompt-text", action="store_true", help="with --prompts: add the prompt itself")
    parser.add_argument("--overwrite", action="store_true", help="replace DEST.jsonl if it exists")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")


def execute(args: argparse.Namespace) -> int:
    """Exports, and prints what came of it. Returns 0."""
    from hpcinfer.data.export import ExportOptions, export_jsonl

    to_stdout = args.destination == "-"
    if to_stdout and args.json:
        raise UsageError("--json has no place beside an export to standard output", fix="give a file as DEST")
    options = ExportOptions(
        token_ids=args.token_ids, prompts=args.prompts, dataset=args.dataset, prompt_text=args.prompt_text
    )
    destination = sys.stdout.buffer if to_stdout else args.destination
    summary = export_jsonl(args.source, destination, options, overwrite=args.overwrite)
    if to_stdout:
        sys.stdout.buffer.flush()
    elif args.json:
        print(json.dumps(dataclasses.asdict(summary)))
    else:
        print(f"{summary.destination}: {format_count(summary.num_rows)} generations of {summary.source}")
        if not summary.complete:
            print("the source does not hold every row of its run")
    return ExitCode.DONE
