"""Which attention backend this machine uses for a model, and for each other one the condition that it does not meet.

The choice is made by engine.attention of the job, then by HPCINFER_ATTENTION_BACKEND, then by this matrix. Without a GPU it also
says what each kind of GPU would get.
"""

from __future__ import annotations

import argparse
import json

from hpcinfer.errors import ExitCode, UsageError


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `hpcinfer attention`."""
    # Defaults are those of ModelSection and ParallelConfig (a test compares them); numpy is not loaded for --help.
    parser.add_argument("--model", default="", metavar="FOLDER", help="a Hugging Face folder (default: Llama-3.1-8B's dimensions)")
    parser.add_argument(
        "--dtype", default="auto", choices=("float32", "bfloat16", "float16", "auto"), help="default: %(default)s, the checkpoint's"
    )
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="ranks that share the heads (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def execute(args: argparse.Namespace) -> int:
    """Prints the matrix. Returns 0 where a backend would be used, 2 where none would."""
    import dataclasses
    import os

    from hpcinfer.attention.matrix import attention_matrix
    from hpcinfer.attention.registry import ENVIRONMENT_VARIABLE
    from hpcinfer.config.model import ModelConfig

    if args.tp < 1:
        raise UsageError(f"--tp {args.tp}", fix="give 1 or more")
    model = ModelConfig.from_folder(args.model) if args.model else None
    matrix = attention_matrix(
        model, args.model or "Llama-3.1-8B's dimensions", dtype=args.dtype, tp=args.tp,
        environment=os.environ.get(ENVIRONMENT_VARIABLE, ""),
    )
    print(json.dumps(dataclasses.asdict(matrix)) if args.json else _text(matrix))
    return ExitCode.DONE if matrix.problem is None else ExitCode.USAGE


def _text(matrix) -> str:
    machine = matrix.device
    if matrix.capability:
        machine += f", compute capability {matrix.capability}, CUDA {matrix.cuda}"
    features = [name for name, there in (("sliding window", matrix.sliding_window), ("attention sinks", matrix.sinks)) if there]
    heads = f"{matrix.num_heads} query and {matrix.num_kv_heads} key/value heads of {matrix.head_dim} a rank"
    lines = [
        f"machine  {machine}; found: {', '.join(matrix.packages) or 'none of the optional packages'}",
        f"model    {matrix.model}: {', '.join([matrix.dtype, heads, *features])}",
        "",
    ]
    for row in matrix.backends:
        verdict = row.refused or "would do"
        if row.used:
            verdict = f"used, with pages of {matrix.block_size} tokens"
        lines.append(f"{row.name:<15} {verdict}")
    if matrix.gpus:
        lines += ["", "on GPUs, with CUDA 13:"]
        for gpu in matrix.gpus:
            line = f"{gpu.capability:>4} {gpu.gpus:<16} "
            line += f"{gpu.backend}, pages of {gpu.block_size} tokens" if gpu.backend else "none"
            lines.append(line + (f"; with torch alone {gpu.plain or 'none'}: {gpu.missing}" if gpu.missing else ""))
    lines += ["", "not supported:"]
    lines += [f"{name:<15} {reason.partition(': ')[2]}" for name, reason in matrix.not_supported.items()]
    if matrix.problem:
        lines += ["", matrix.problem]
    return "\n".join(lines)
