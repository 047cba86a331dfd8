"""The command `hpcinfer VERB ...`: finds the verb, imports its module alone, turns errors into messages and exit codes.

Nothing heavy is imported here or in the verbs' modules before `execute`: `--help` answers at once.

A verb's module has a docstring (its help text) and two functions:
    configure(parser: argparse.ArgumentParser) -> None      declares the arguments; defaults come from their dataclass
    execute(args: argparse.Namespace) -> int                runs the verb and returns its exit code
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple, NoReturn

import hpcinfer
from hpcinfer.errors import ExitCode, HpcinferError, UsageError
from hpcinfer.launch.env import LaunchEnvironment

INTERRUPTED = 130
"""128 + SIGINT, as shells report it."""
BROKEN_PIPE = 141
"""128 + SIGPIPE: whoever read our output went away."""


class Verb(NamedTuple):
    """A verb of the command line."""

    module: str
    help: str


VERBS: dict[str, Verb] = {
    "convert": Verb("hpcinfer.cli.convert", "prompts from JSON Lines, CSV, Parquet, OpenAI batches, text or HDF5 to a prompts file"),
    "run": Verb("hpcinfer.cli.run", "generate for every prompt of a job; go on with a run that was begun"),
    "submit": Verb("hpcinfer.cli.submit", "hand a job to Slurm"),
    "doctor": Verb("hpcinfer.cli.doctor", "look over machine and job before a run: MPI, GPUs, links, files, memory, limits"),
    "status": Verb("hpcinfer.cli.status", "how far a run is"),
    "merge": Verb("hpcinfer.cli.merge", "merge the segments of a run into generations.h5"),
    "export": Verb("hpcinfer.cli.export", "generations to JSON Lines, CSV, Parquet or OpenAI's batch output"),
    "inspect": Verb("hpcinfer.cli.inspect", "what is in a file of prompts or generations, or in a run directory"),
    "attention": Verb("hpcinfer.cli.attention", "which attention backend this machine uses for a model, and why not another"),
    "trace": Verb("hpcinfer.cli.trace", "what every rank of a run did when: a table, and a file for Perfetto"),
    "bench": Verb("hpcinfer.cli.bench", "measure this machine and this program"),
}


class _Parser(argparse.ArgumentParser):
    """argparse without abbreviated flags, whose errors are UsageErrors with our exit code."""

    def __init__(self, **settings) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, fix=f"see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code: 0 done, 1 failed, 2 usage, 3 incomplete but resumable.

    `--traceback` before the verb shows where an error came from.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _fill_closed_streams()
    # Messages may hold file names that are not valid UTF-8; to print them escaped beats failing to print.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    show_traceback = False
    try:
        options = _top_parser().parse_args(arguments)
        show_traceback = options.traceback
        module = _module_of(options.verb)
        parser = _Parser(prog=f"hpcinfer {options.verb}", description=_description(module))
        module.configure(parser)
        code = int(module.execute(parser.parse_args(options.arguments)))
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse, after --help and --version
        return stop.code if isinstance(stop.code, int) else ExitCode.DONE
    except HpcinferError as error:
        if show_traceback:
            traceback.print_exc()
        if LaunchEnvironment.from_environ().launcher_rank == 0:  # all ranks of a start come to the same error here
            print(f"hpcinfer: {error}", file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        print("hpcinfer: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit; let that go nowhere (Python's documentation of SIGPIPE).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if show_traceback:
            traceback.print_exc()
        print(f"hpcinfer: {error}", file=sys.stderr)
        return ExitCode.FAILED


def _fill_closed_streams() -> None:
    """Puts something where the caller closed standard streams (`>&-`): the next file that is opened would get their number, and what
    libraries print would be written into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            os.set_inheritable(number, True)
        if number:
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))


def _top_parser() -> argparse.ArgumentParser:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items())
    parser = _Parser(
        prog="hpcinfer",
        usage="hpcinfer [--help] [--version] [--traceback] VERB ...",
        description="Offline batch inference of language models on MPI ranks.",
        epilog=f"verbs:\n{verbs}\n\n`hpcinfer VERB --help` says more.\n"
        "Exit codes: 0 done, 1 failed, 2 usage, 3 incomplete but resumable.",
    )
    parser.add_argument("--version", action=_Version, help="show the version and stop")
    parser.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")
    parser.add_argument("verb", nargs="?", metavar="VERB", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


class _Version(argparse.Action):
    def __init__(self, option_strings, dest, **settings) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **settings)

    def __call__(self, parser, namespace, values, option_string=None) -> NoReturn:
        print(f"hpcinfer {hpcinfer.__version__}")
        parser.exit()


def _module_of(name: str | None) -> ModuleType:
    if name is None:
        raise UsageError("no verb", fix=f"give one of {', '.join(VERBS)}; hpcinfer --help says more")
    if name not in VERBS:
        import difflib

        close = difflib.get_close_matches(name, VERBS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UsageError(f"no verb {name!r}", fix=f"{hint}verbs: {', '.join(VERBS)}")
    verb = VERBS[name]
    try:
        return importlib.import_module(verb.module)
    except ModuleNotFoundError as error:
        if error.name != verb.module:
            raise
        raise UsageError(f"the verb {name!r} is not part of this version of hpcinfer") from error


def _description(module: ModuleType) -> str:
    return (module.__doc__ or "").strip()
