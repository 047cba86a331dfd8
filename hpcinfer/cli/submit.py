"""Submit a job to Slurm: render its sbatch script, let Slurm check it, hand it over.

    hpcinfer submit jobs/demo.toml --site mycluster --nodes 2 --time 04:00:00
    hpcinfer submit jobs/demo.toml --site mycluster --array 16

The job file says what to run, the site file (slurm/sites has examples; yours go to ~/.config/hpcinfer/sites) what the cluster needs.
Paths are those of the folder that it is submitted from. The job tells its ranks before the time is over, and goes on in a
new life until every row is done. Everything may be submitted again, also while it runs: starts on one run directory share the work.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from pathlib import Path

from hpcinfer.errors import ConfigError, ExitCode, LaunchError


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `hpcinfer submit`."""
    parser.add_argument("job", metavar="JOB.toml", help="job file")
    parser.add_argument("--site", default="", metavar="NAME", help="site file, by name or path (default: $HPCINFER_SITE)")
    parser.add_argument(
        "--nodes", type=int, default=None, metavar="N", help="nodes in all (default: as few as hold the replicas of the job)"
    )
    parser.add_argument("--time", default="", metavar="LIMIT", help="time limit of a job, as sbatch takes it (default: the site's)")
    parser.add_argument(
        "--array", type=int, default=None, metavar="K", help="an array of K tasks that share the run directory, the nodes divided "
        "over them (default: an array where more nodes than the site's slurm.array_nodes hold independent replicas)",
    )
    parser.add_argument(
        "--steps", action="store_true", help="one srun step for each replica in a single job: for sites without arrays. Isolates failing "
        "processes only; a lost first node ends all",
    )
    parser.add_argument("--name", default="", metavar="NAME", help="Slurm's job name (default: the job file's)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides",
        help="override a key of the job file; may be given again",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script and submit nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def execute(args: argparse.Namespace) -> int:
    """Prints the script, or submits it and prints the job's id and the next commands. Returns 0."""
    from hpcinfer.config.load import load_job
    from hpcinfer.launch.sbatch import render
    from hpcinfer.launch.slurm import check_script, submit_script

    job = load_job(args.job, args.overrides)
    batch = _batch_job(args, job)
    script = render(batch)
    if args.dry_run:
        sys.stdout.flush()
        sys.stdout.buffer.write(script.encode(errors="surrogateescape"))
        return ExitCode.DONE
    _check_model(job)
    _check_folder(Path.cwd())
    # Where requeue is forbidden, singletons make a chain of each name: tasks are then jobs of their own names.
    tasks = batch.shape.tasks if not batch.site.slurm.requeue else 1
    names = [f"{batch.name}-{task}" for task in range(1, tasks + 1)] if tasks > 1 else [batch.name]
    verdict = check_script(script)
    jobs: dict[str, int] = {}
    for name in names:
        try:
            jobs[name] = submit_script(script, ["--job-name", name])
        except LaunchError as error:
            if jobs:
                ids = " ".join(map(str, jobs.values()))
                error.fix = f"submitted so far: {ids}; keep them, or: scancel {ids}. {error.fix}"
            raise
    report = _report(batch, jobs, verdict)
    print(json.dumps(report) if args.json else _text(report))
    return ExitCode.DONE


def _batch_job(args: argparse.Namespace, job):
    from hpcinfer.config.site import Site, check_time, time_limit_s
    from hpcinfer.launch.sbatch import BatchJob
    from hpcinfer.launch.shape import plan_shape
    from hpcinfer.launch.site import chosen_site

    site_name, site = chosen_site(args.site, os.environ)
    site = site or Site()
    time = args.time or site.slurm.time
    check_time("--time", time)
    if time_limit_s(time) <= site.slurm.signal_s:
        raise ConfigError(
            f"--time {time} ends before the ranks could be told", found=f"slurm.signal_s = {site.slurm.signal_s}",
            fix="give more time, or lower slurm.signal_s of the site",
        )
    if args.name and not re.fullmatch(r"\w[\w.-]*", args.name, re.ASCII):
        raise ConfigError(f"--name {args.name!r}", fix="use letters, digits, dots, dashes and underscores")
    name = args.name or re.sub(r"[^\w.-]", "_", Path(args.job).stem, flags=re.ASCII).lstrip("-.") or "hpcinfer"
    return BatchJob(
        name=name, job_file=args.job, overrides=tuple(args.overrides), output=job.data.output, is_trial=job.data.is_trial, site=site,
        site_name=site_name, time=time, python=sys.executable, command=_command(args),
        shape=plan_shape(job.parallel, site.slurm, nodes=args.nodes, tasks=args.array, steps=args.steps),
    )


def _command(args: argparse.Namespace) -> list[str]:
    """The command line again, as short as it can be."""
    words = ["hpcinfer", "submit", args.job]
    for flag, value in (
        ("--site", args.site), ("--nodes", args.nodes), ("--time", args.time), ("--array", args.array), ("--name", args.name),
    ):  # fmt: skip
        words += [flag, str(value)] if value else []
    words += ["--steps"] if args.steps else []
    return words + [word for override in args.overrides for word in ("--set", override)]


def _check_model(job) -> None:
    """Misfits of model and layout, before the job waits in a queue for hours."""
    from hpcinfer.config.model import ModelConfig
    from hpcinfer.config.parallel import check_layout

    check_layout(ModelConfig.from_folder(job.model.path), job.parallel)


def _check_folder(folder: Path) -> None:
    """Slurm expands % in the path of a job's log, and gives a backslash a meaning: the job would end without a word."""
    if set(str(folder)) & set("%\\"):
        raise ConfigError(
            f"jobs cannot be submitted from {folder}", found="Slurm reads % and \\ in the path of a log as its own",
            fix="submit from a folder without them; paths in the job file may hold anything",
        )


def _report(batch, jobs: dict[str, int], verdict: str) -> dict:
    from hpcinfer.launch.sbatch import as_argument, describe

    shape = batch.shape
    is_array = shape.tasks > 1 and len(jobs) == 1
    ids = [str(job) for job in jobs.values()]
    if batch.site.slurm.requeue:
        logs = [f"{name}-{job}_*.log" if is_array else f"{name}-{job}.log" for name, job in jobs.items()]
        commands = {"queue": f"squeue --jobs={','.join(ids)}", "log": f"tail -F {' '.join(logs)}", "stop": f"scancel {' '.join(ids)}"}
    else:  # every life is a job of its own
        names = ",".join(jobs)
        commands = {
            "queue": f"squeue --me --name={names}", "log": f"tail -F {' '.join(f'{name}-*.log' for name in jobs)}",
            "stop": "; ".join(f"scancel --user=$USER --name={name}" for name in jobs),
        }
    output = as_argument(batch.output)
    return {
        "jobs": list(jobs.values()),
        "what": describe(batch),
        "shape": {"tasks": shape.tasks, "steps": shape.steps, "nodes": shape.nodes, "ranks": shape.ranks},
        "time": batch.time,
        "site": batch.site_name,
        "slurm": verdict,
        "output": batch.output,
        "commands": {
            "status": shlex.join(["hpcinfer", "status", output]),
            **commands,
            "result": shlex.join(["hpcinfer", "inspect", os.path.join(output, "generations.h5")]),
        },
    }


def _text(report: dict) -> str:
    numbers = ", ".join(map(str, report["jobs"]))
    lines = [f"Submitted job {numbers}: {report['what']}, {report['time']} each life.", f"  slurm     {report['slurm']}"]
    return "\n".join(lines + [f"  {name:<9} {command}" for name, command in report["commands"].items()])
