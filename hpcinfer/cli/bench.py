"""Measure this machine and this program. Every benchmark prints one JSON object as its last line.

    hpcinfer bench generate --model qwen3-0.6b-32k --workload W1 --dtype bfloat16
    hpcinfer bench data --rows 1000000
"""

from __future__ import annotations

import argparse

from hpcinfer.errors import ExitCode


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the benchmarks and their arguments."""
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    generate = benchmarks.add_parser("generate", help="generation speed of one replica on a fixed workload")
    # Names and defaults are those of bench.generate.GenerateOptions (a test compares them); torch is not loaded for --help.
    generate.add_argument("--model", default="small", help="checkpoint folder, config.json or dimensions by name (default: %(default)s)")
    generate.add_argument("--workload", default="W1", help="W1, W2 or W3 (default: %(default)s)")
    generate.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"), help="default: %(default)s")
    generate.add_argument("--tp", type=int, default=1, help="tensor parallel ranks (default: %(default)s)")
    generate.add_argument("--pp", type=int, default=1, help="pipeline stages (default: %(default)s)")
    generate.add_argument("--repeats", type=int, default=1, help="runs after the warm-up; the median counts (default: %(default)s)")
    generate.add_argument("--attention", default="auto", help="attention backend (default: %(default)s)")
    data = benchmarks.add_parser("data", help="rows through everything but the model")
    data.add_argument("--rows", type=int, default=100_000, help="prompts (default: %(default)s)")
    data.add_argument("--model", default="datasets/demo-model", help="folder with the tokenizer (default: %(default)s)")
    data.add_argument("--folder", default="", help="an empty folder on the file system to measure (default: a temporary one)")


def execute(args: argparse.Namespace) -> int:
    """Runs the benchmark. Returns the exit code."""
    return {"generate": _generate, "data": _data}[args.benchmark](args)


def _data(args: argparse.Namespace) -> int:
    import json
    import tempfile
    from pathlib import Path

    from hpcinfer.bench.data import run_data
    from hpcinfer.errors import UsageError

    if args.rows < 1:
        raise UsageError(f"--rows {args.rows}", fix="give 1 or more")
    with tempfile.TemporaryDirectory(prefix="hpcinfer-bench-", dir=args.folder or None) as folder:
        print(json.dumps(run_data(Path(folder), args.rows, args.model)))
    return ExitCode.DONE


def _generate(args: argparse.Namespace) -> int:
    """Starts the ranks that the layout needs."""
    import sys

    from hpcinfer.errors import UsageError
    from hpcinfer.launch.env import LaunchEnvironment
    from hpcinfer.launch.report import run_as_rank
    from hpcinfer.launch.start import start_ranks

    if min(args.tp, args.pp, args.repeats) < 1:
        raise UsageError("--tp, --pp and --repeats are 1 or more")
    environment = LaunchEnvironment.from_environ()
    if environment.launcher == "none" and args.tp * args.pp > 1:
        start_ranks(args.tp * args.pp, sys.argv[1:])
    return run_as_rank(lambda place: _run(args, environment, place))


def _run(args: argparse.Namespace, environment, place) -> int:
    import json

    from hpcinfer.bench.generate import GenerateOptions, run_generate
    from hpcinfer.runner.start import enter_world

    world = enter_world(environment, place)
    options = {name: value for name, value in vars(args).items() if name != "benchmark"}
    figures = run_generate(GenerateOptions(**options), world)
    world.close()
    if figures is not None:
        print(
            f"{figures['workload']} on {figures['model']} ({figures['dtype']}, {figures['ranks']} ranks): "
            f"{figures['output_tokens_per_s']:.1f} output tokens/s"
        )
        print(json.dumps(figures))
    return ExitCode.DONE
