"""Measure this machine and this program. Every benchmark prints one JSON object as its last line.

    hpcinfer bench generate --model qwen3-0.6b-32k --workload W1 --dtype bfloat16
    hpcinfer bench data --rows 1000000
    hpcinfer bench overlap --rate-gbit 1
    hpcinfer bench attention --contexts 1024,8192 --sequences 1,64
"""

from __future__ import annotations

import argparse

from hpcinfer.errors import ExitCode


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the benchmarks and their arguments."""
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    generate = benchmarks.add_parser("generate", help="generation speed of one replica on a fixed workload")
    # Names and defaults are those of bench.generate.GenerateOptions (a test compares them); torch is not loaded for --help.
    generate.add_argument("--model", default="small", help="checkpoint folder, config.json or dimensions by name: small, qwen3-0.6b, qwen3-0.6b-32k, llama-3.1-8b, gpt-oss-20b, gpt-oss-20b-mxfp4 (default: %(default)s)")
    generate.add_argument("--workload", default="W1", help="W1, W2, W3, chat, or INxOUT tokens such as 1000x1000 (default: %(default)s)")
    generate.add_argument("--prompts", type=int, default=0, help="number of prompts (default: the workload's)")
    generate.add_argument("--sequences", type=int, default=0, help="sequences in work at once (default: all prompts, at most 512)")
    generate.add_argument("--batch-tokens", type=int, default=2048, help="tokens of a step (default: %(default)s)")
    generate.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"), help="default: %(default)s")
    generate.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: %(default)s, GPUs where there are any")
    generate.add_argument("--tp", type=int, default=1, help="tensor parallel ranks (default: %(default)s)")
    generate.add_argument("--pp", type=int, default=1, help="pipeline stages (default: %(default)s)")
    generate.add_argument("--repeats", type=int, default=1, help="runs after the warm-up; the median counts (default: %(default)s)")
    generate.add_argument("--attention", default="auto", help="attention backend (default: %(default)s)")
    generate.add_argument("--experts", default="unpacked", choices=("unpacked", "packed"), help="MXFP4 experts in memory (default: %(default)s)")
    generate.add_argument("--graphs", default="auto", choices=("auto", "on", "off"), help="capture decode steps (default: %(default)s)")
    generate.add_argument("--run-ahead", default="auto", choices=("auto", "on", "off"), help="queue steps before tokens are known (default: %(default)s)")
    generate.add_argument("--against", default="", choices=("", "transformers"), help="compare with generate of transformers in the same run")
    _configure_overlap(benchmarks.add_parser("overlap", help="what hiding communication is worth: tp2 and pp2 on two ranks"))
    _configure_attention(benchmarks.add_parser("attention", help="attention alone: decode against bandwidth, prefill against the matrix rate"))
    data = benchmarks.add_parser("data", help="rows through everything but the model")
    data.add_argument("--rows", type=int, default=100_000, help="prompts (default: %(default)s)")
    data.add_argument("--model", default="datasets/demo-model", help="folder with the tokenizer (default: %(default)s)")
    data.add_argument("--folder", default="", help="an empty folder on the file system to measure (default: a temporary one)")


def _configure_overlap(overlap: argparse.ArgumentParser) -> None:
    # Names and defaults are those of bench.overlap_cases.OverlapOptions (a test compares them).
    overlap.add_argument("--hidden", type=int, default=2048, help="hidden size of the random model (default: %(default)s)")
    overlap.add_argument("--layers", type=int, default=4, help="its layers (default: %(default)s)")
    overlap.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="default: %(default)s")
    overlap.add_argument("--prefill", default="512", help="tokens of a prefill step, separated by commas (default: %(default)s)")
    overlap.add_argument("--sequences", type=int, default=64, help="sequences of a decode step (default: %(default)s)")
    overlap.add_argument("--microbatches", default="1,2,4", help="steps in flight with pp2 (default: %(default)s)")
    overlap.add_argument("--output-tokens", type=int, default=12, help="tokens that a sequence decodes (default: %(default)s)")
    overlap.add_argument("--prompts", type=int, default=8, help="prefill steps in a run of pp2 (default: %(default)s)")
    overlap.add_argument("--repeats", type=int, default=5, help="repetitions after a warm-up; medians count (default: %(default)s)")
    overlap.add_argument("--layouts", default="tp,pp", help="which to measure (default: %(default)s)")
    overlap.add_argument(
        "--link", default="auto", choices=("auto", "namespaces", "loopback"),
        help="namespaces: a rate-limited link, needs root; auto: that where it can be made (default: %(default)s)",
    )
    overlap.add_argument("--rate-gbit", type=float, default=1.0, help="of that link, in Gbit/s each way (default: %(default)s)")
    overlap.add_argument("--out", default="", help="a file for the figures")
    overlap.add_argument("--trace", default="", help="a folder for records, as `hpcinfer trace FOLDER --start NAME` reads them")
    overlap.add_argument("--link-used", default="", help=argparse.SUPPRESS)


def _configure_attention(attention: argparse.ArgumentParser) -> None:
    # Names and defaults are those of bench.attention.AttentionOptions (a test compares them).
    attention.add_argument("--backends", default="auto", help="names, separated by commas; auto; or all that do not refuse (default: %(default)s)")
    attention.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: %(default)s, a GPU where there is one")
    attention.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"), help="default: %(default)s")
    attention.add_argument("--heads", type=int, default=32, help="query heads (default: %(default)s)")
    attention.add_argument("--kv-heads", type=int, default=8, help="key/value heads (default: %(default)s)")
    attention.add_argument("--head-dim", type=int, default=128, help="default: %(default)s")
    attention.add_argument("--block-size", type=int, default=0, help="tokens in a page (default: what the backend prefers)")
    attention.add_argument("--window", type=int, default=0, help="sliding window in tokens (default: none)")
    attention.add_argument("--sinks", action="store_true", help="with attention sinks")
    attention.add_argument("--contexts", default="1024,8192,65536", help="tokens of a sequence in decode, separated by commas (default: %(default)s)")
    attention.add_argument("--sequences", default="1,16,64,256", help="sequences that decode at once (default: %(default)s)")
    attention.add_argument("--prefill", default="2048,8192", help="tokens of a prompt in prefill (default: %(default)s)")
    attention.add_argument("--repeats", type=int, default=20, help="timed calls; medians count (default: %(default)s)")


def execute(args: argparse.Namespace) -> int:
    """Runs the benchmark. Returns the exit code."""
    run = {"generate": _generate, "data": _data, "overlap": _overlap, "attention": _attention}
    return run[args.benchmark](args)


def _attention(args: argparse.Namespace) -> int:
    import json

    from hpcinfer.bench.attention import AttentionOptions, run_attention, table

    options = {name: value for name, value in vars(args).items() if name != "benchmark"}
    figures = run_attention(AttentionOptions(**options))
    print(table(figures))
    print(json.dumps(figures))
    return ExitCode.DONE


def _overlap(args: argparse.Namespace) -> int:
    """Makes a link and starts a rank at each of its ends, which then measure."""
    import sys

    from hpcinfer.bench.link import open_link, run_on_link
    from hpcinfer.bench.overlap_cases import OverlapOptions
    from hpcinfer.launch.env import LaunchEnvironment
    from hpcinfer.launch.report import run_as_rank

    environment = LaunchEnvironment.from_environ()
    if environment.launcher != "none":
        return run_as_rank(lambda place: _measure_overlap(args, environment, place))
    OverlapOptions(**_overlap_options(args))  # mistakes are found before anything is started
    with open_link(args.link, args.rate_gbit * 1e9) as link:
        return run_on_link(link, [*sys.argv[1:], "--link-used", link.description])


def _overlap_options(args: argparse.Namespace) -> dict:
    return {name: value for name, value in vars(args).items() if name not in ("benchmark", "link_used")}


def _measure_overlap(args: argparse.Namespace, environment, place) -> int:
    import json

    from hpcinfer.bench.overlap import run_overlap
    from hpcinfer.bench.overlap_cases import OverlapOptions
    from hpcinfer.bench.overlap_report import table
    from hpcinfer.runner.start import enter_world

    world = enter_world(environment, place)
    launched = f"the ranks of a launcher, on {world.num_nodes} node(s)"
    figures = run_overlap(OverlapOptions(**_overlap_options(args)), world, link=args.link_used or launched)
    world.close()
    if figures is not None:
        print(table(figures))
        print(json.dumps(figures))
    return ExitCode.DONE


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

    if min(args.tp, args.pp, args.repeats, args.batch_tokens) < 1 or min(args.prompts, args.sequences) < 0:
        raise UsageError("--tp, --pp, --repeats and --batch-tokens are 1 or more, --prompts and --sequences 0 or more")
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
            + (f", transformers {figures['transformers']['output_tokens_per_s']:.1f}" if options["against"] else "")
        )
        print(json.dumps(figures))
    return ExitCode.DONE
