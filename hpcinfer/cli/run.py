"""Generate for every prompt of a job file.

Under srun or mpiexec the ranks that were started are used; alone, the ranks that the layout needs are started here.
Running a job whose run directory exists goes on from what is committed there, on any number of ranks and in any layout.

--limit and --rows make a trial: a start that takes some rows only. Its run directory is like any other, so that a start without them
goes on from it.

Exit codes: 0 every row is in generations.h5 (of a trial: its rows are in trial.h5), 1 failed, 2 the job or the command line is wrong, 3
incomplete but resumable.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys

from hpcinfer.errors import DataError, ExitCode


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `hpcinfer run`."""
    parser.add_argument("job", metavar="JOB.toml", help="job file; `jobs/` has examples, hpcinfer/config/job.py every key")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides",
        help="override a key of the job file; may be given again",
    )
    parser.add_argument(
        "--site", default="", metavar="NAME", help="site file, by name or path: variables of the cluster, NCCL's among them "
        "(default: $HPCINFER_SITE)",
    )
    parser.add_argument(
        "--max-failed", metavar="N|P%", dest="overrides", action="append", type=lambda value: f"run.max_failed={value}",
        help="more failed rows than this count or share end the run with exit code 1; short for --set run.max_failed=...",
    )
    parser.add_argument(
        "--limit", metavar="N", dest="overrides", action="append", type=_limit,
        help="a trial: N rows drawn from the whole input, in <output>-trial unless --set data.output names a folder; it ends with what "
        "all rows would take. Short for --set data.limit=N",
    )
    parser.add_argument(
        "--rows", metavar="A:B", dest="overrides", action="append", type=lambda value: f"data.rows={value!r}",
        help="a trial of rows A to B - 1 (with --limit: of rows drawn from these); short for --set data.rows=A:B",
    )
    parser.add_argument(
        "--retry-failed", dest="overrides", action="append_const", const="run.retry_failed=true",
        help="compute failed rows again, also of a complete run; short for --set run.retry_failed=true",
    )
    parser.add_argument(
        "--trace", dest="overrides", action="append_const", const="run.trace=true",
        help="record what every rank does, for `hpcinfer trace`; short for --set run.trace=true",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress and no summary on the console")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    parser.add_argument("--summary", default="", metavar="FILE", help="also write the summary as JSON to FILE")
    parser.add_argument(
        "--show", type=int, default=5, metavar="N", help="at the end show the first N generations (default: %(default)s)"
    )


def _limit(value: str) -> str:
    if not re.fullmatch(r"0*[1-9][0-9]*", value):  # in a job file 0 stands for all rows, which nobody means by a trial of 0 rows
        raise argparse.ArgumentTypeError(f"{value!r} is not a number of rows above 0")
    return f"data.limit={int(value)}"


def execute(args: argparse.Namespace) -> int:
    """Runs the job. Returns the exit code; replaces this process by a launcher where ranks have to be started."""
    from hpcinfer.config.load import load_job
    from hpcinfer.launch.env import LaunchEnvironment
    from hpcinfer.launch.report import Place, run_as_rank
    from hpcinfer.launch.site import apply_site
    from hpcinfer.launch.start import start_ranks
    from hpcinfer.runner.start import ranks_needed

    environment = LaunchEnvironment.from_environ()
    if environment.launcher == "none":
        site, _ = apply_site(args.site, os.environ)
        num_ranks = ranks_needed(load_job(args.job, args.overrides))
        if num_ranks > 1 or environment.in_batch_shell:
            start_ranks(
                num_ranks, sys.argv[1:], mpi_flavour=site.slurm.mpi if site else None,
                srun_args=site.slurm.srun_options if site else (),
            )

    def rank_main(place: Place) -> int:
        apply_site(args.site, os.environ)  # here, so that a rank that cannot read it ends the others
        try:
            return _run(args, environment, place)
        except KeyboardInterrupt:
            if place.rank == 0:
                print("run the same command again: it goes on from what is committed", file=sys.stderr, flush=True)
            raise

    return run_as_rank(rank_main)


def _run(args: argparse.Namespace, environment, place) -> int:
    from hpcinfer.launch.signals import DrainFlag
    from hpcinfer.runner.start import run_as_started

    drain = DrainFlag()
    drain.install()
    summary = run_as_started(
        args.job, args.overrides, environment, place, drain, quiet=args.quiet or args.json
    )
    if place.rank == 0:
        try:
            _report(args, summary)
        except (OSError, DataError) as error:  # the work is done and its exit code stands, whoever cannot be told
            with contextlib.suppress(OSError):
                print(f"hpcinfer: the summary cannot be written: {error}", file=sys.stderr)
    return ExitCode.DONE if summary.is_done else ExitCode.RESUMABLE


def _report(args: argparse.Namespace, summary) -> None:
    from hpcinfer.runner.start import write_summary
    from hpcinfer.runner.summary import summary_text

    if args.summary:
        write_summary(args.summary, summary)
    if args.json:
        print(json.dumps(summary.to_dict()), flush=True)
    elif not args.quiet:
        if summary.is_done and args.show > 0:
            _show(args, summary.output)
        print(summary_text(summary), flush=True)


def _show(args: argparse.Namespace, output: str) -> None:
    from hpcinfer.config.load import load_job
    from hpcinfer.runner.examples import example_lines

    for line in example_lines(load_job(args.job, args.overrides), output, args.show):
        print(line)
