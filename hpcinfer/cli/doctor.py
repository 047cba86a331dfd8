"""Look over a machine and a job before it runs: a table of green, yellow and red, each red with its fix.

    hpcinfer doctor                                     this machine
    hpcinfer doctor jobs/demo.toml                      and what can be seen of a job from here
    srun -N 2 ... hpcinfer doctor jobs/demo.toml        all of it: ranks, GPUs, links, the file system on all nodes

In the shell of a batch job it starts itself on all of the job's ranks with srun, as `hpcinfer run` does. What a machine does
not have (GPU, Slurm, InfiniBand) is "not here". Nothing is changed; a folder is written beside the output and removed.

Exit codes: 0 nothing is red, 1 something is, 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import os
import sys


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `hpcinfer doctor`."""
    parser.add_argument(
        "job", nargs="?", default="", metavar="JOB.toml", help="job file; without one only the machine is examined"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides",
        help="override a key of the job file; may be given again",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    # For tests, and for containers that show the host's tree elsewhere. The default is that of doctor.examine.DoctorOptions.
    parser.add_argument("--sys-root", default="/sys", help=argparse.SUPPRESS)


def execute(args: argparse.Namespace) -> int:
    """Examines. Returns the exit code; in a batch shell replaces this process by srun."""
    from hpcinfer.errors import UsageError
    from hpcinfer.launch.env import LaunchEnvironment
    from hpcinfer.launch.report import Place, run_as_rank
    from hpcinfer.launch.site import apply_site
    from hpcinfer.launch.start import start_ranks

    if args.overrides and not args.job:
        raise UsageError("--set without a job file", fix="name the job file before it")
    environment = LaunchEnvironment.from_environ()
    if environment.in_batch_shell:
        site, _ = apply_site("", os.environ)
        start_ranks(
            None, sys.argv[1:], mpi_flavour=site.slurm.mpi if site else None, srun_args=site.slurm.srun_options if site else ()
        )

    def rank_main(place: Place) -> int:
        apply_site("", os.environ)  # before MPI and NCCL read their variables
        from hpcinfer.doctor.examine import DoctorOptions
        from hpcinfer.doctor.run import run_doctor

        options = DoctorOptions(job=args.job, overrides=tuple(args.overrides), sys_root=args.sys_root)
        return run_doctor(options, environment, place, as_json=args.json)

    return run_as_rank(rank_main)
