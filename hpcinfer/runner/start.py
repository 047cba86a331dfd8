"""Starting a run: as one of the ranks that a launcher made, alone, or by starting the ranks that the layout needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import typing
from collections.abc import Sequence
from pathlib import Path

from hpcinfer.comm.mpi_library import load_launched_mpi
from hpcinfer.config.job import JobConfig
from hpcinfer.config.load import load_job
from hpcinfer.config.model import ModelConfig
from hpcinfer.config.parallel import check_layout
from hpcinfer.errors import HpcinferError, LaunchError
from hpcinfer.launch.env import LaunchEnvironment
from hpcinfer.launch.process import die_with_parent
from hpcinfer.launch.report import Place, end_with
from hpcinfer.launch.site import apply_site
from hpcinfer.launch.signals import DrainFlag
from hpcinfer.runner.summary import RunSummary

if typing.TYPE_CHECKING:
    from hpcinfer.comm.bootstrap import World


def run(job: str | Path, overrides: Sequence[str] = (), *, quiet: bool = True) -> RunSummary:
    """Run a job file from Python and return its summary, complete or not.

    In a process that srun or mpiexec started, all ranks must call it, and each gets the summary. Elsewhere a layout of one
    rank runs in this process; a larger one in ranks that are started for it and end with this process.

    The variable HPCINFER_SITE names the site, as for the command (`launch.site`).

    Args:
        job: path of a TOML file.
        overrides: "section.key=value" strings, as `--set` takes them.
        quiet: no progress on stderr.

    Raises:
        HpcinferError: see `errors`.
    """
    apply_site("", os.environ)
    environment = LaunchEnvironment.from_environ()
    if environment.launcher == "none" and ranks_needed(load_job(job, overrides)) > 1:
        return _run_in_ranks(job, overrides, quiet)
    place = Place()
    try:
        return run_as_started(job, overrides, environment, place, DrainFlag(), quiet=quiet)
    except Exception as error:
        if place.size > 1 and not getattr(error, "agreed", False):
            end_with(error, place)  # the other ranks wait for this one in a collective
        raise


def ranks_needed(job: JobConfig) -> int:
    """Ranks of a job that is started alone: one replica, or as many as parallel.dp says.

    Raises:
        ConfigError: the model cannot be split so.
    """
    check_layout(ModelConfig.from_folder(job.model.path), job.parallel)
    return job.parallel.replica_size * (job.parallel.dp or 1)


def run_as_started(
    job: str | Path,
    overrides: Sequence[str],
    environment: LaunchEnvironment,
    place: Place,
    drain: DrainFlag,
    *,
    quiet: bool,
) -> RunSummary:
    """Run on the ranks that there are: this process, or those of its launcher.

    Args:
        place: filled in as soon as the world is up, so that errors can be reported from the right rank.
    """
    world = enter_world(environment, place)
    from hpcinfer.parallel.agree import agree_or_raise
    from hpcinfer.runner.batch_runner import run_job

    config = agree_or_raise(world.channel, lambda: load_job(job, overrides))
    world.deadline_s = world.channel.deadline_s = config.comm.deadline_s
    world.strict = world.strict or config.comm.strict
    world.watch(lambda error: end_with(error, place), heartbeat_s=config.comm.heartbeat_s)
    world.use_device(config.engine.device, share_gpu=config.comm.share_gpu)
    summary = run_job(config, world, environment=environment, drain=drain, quiet=quiet)
    world.close()
    return summary


def enter_world(environment: LaunchEnvironment, place: Place) -> World:
    """The world that this process is a rank of; one of a single process where nothing launched it.

    Args:
        place: filled in, so that errors can be reported from the right rank and end all ranks.

    Raises:
        LaunchError: the world is not what the launcher started.
    """
    if environment.launcher != "none":
        die_with_parent()  # before anything that takes time: an orphan could start to write
        load_launched_mpi(environment)  # before torch, which takes seconds
    # torch and MPI are loaded here and not above: starting ranks needs neither.
    from hpcinfer.comm.bootstrap import local_world, start_world

    if environment.launcher == "none":
        return local_world()
    world = start_world(environment=environment)
    place.rank, place.size, place.host, place.abort = world.rank, world.size, world.host, world.abort
    return world


def _run_in_ranks(job: str | Path, overrides: Sequence[str], quiet: bool) -> RunSummary:
    # Beside the output, which all nodes see: rank 0 may be on another one.
    output = Path(load_job(job, overrides).data.output).absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".hpcinfer-", dir=output.parent) as folder:
        report = Path(folder) / "summary.json"
        command = [sys.executable, "-m", "hpcinfer", "run", str(job), "--summary", str(report)]
        command += [word for override in overrides for word in ("--set", override)]
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE if quiet else None, stdout=subprocess.DEVNULL,
            text=True, preexec_fn=die_with_parent, check=False,
        )
        if report.exists():
            return RunSummary(**json.loads(report.read_text()))
        error = LaunchError(
            f"the ranks of {job} ended with exit code {result.returncode} and no summary",
            found=(result.stderr or "see above").strip()[-4000:],
        )
        error.exit_code = result.returncode if result.returncode in (1, 2, 3) else HpcinferError.exit_code
        raise error


def write_summary(path: str | Path, summary: RunSummary) -> None:
    """Write a summary as JSON, whole or not at all. Raises DataError where that cannot be."""
    from hpcinfer.data.hdf5 import whole_file

    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(summary.to_dict(), indent=1) + "\n")
