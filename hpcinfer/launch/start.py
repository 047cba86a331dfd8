"""Start ranks: this process becomes `mpiexec` (or `srun` inside a Slurm job), whose ranks run `hpcinfer` again.

MPI must not have been initialised before: a process that has cannot start another launcher reliably.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from hpcinfer.errors import LaunchError
from hpcinfer.launch.env import LaunchEnvironment
from hpcinfer.launch.guard import srun_flavour

LAUNCHER_PREFIXES = ("SLURM_", "PMI_", "PMIX_", "OMPI_", "PRTE_", "HYDI_", "MPI_LOCAL")
"""Variables with which one launcher tells its processes who they are; another launcher would believe them."""
USER_PREFIXES = ("OMPI_MCA_", "PRTE_MCA_", "PMIX_MCA_", "OMPI_ALLOW_RUN_AS_ROOT")
"""Exceptions: settings that users make."""

MAX_RANKS_A_CORE = 16
"""A start on a single machine with more ranks than this is taken for a mistake."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankCommand:
    """A command that starts ranks: what `os.execvpe` takes."""

    argv: list[str]
    env: dict[str, str]


def start_ranks(
    num_ranks: int | None, argv: Sequence[str], *, mpi_flavour: str | None = None, srun_args: Sequence[str] = ()
) -> NoReturn:
    """Replace this process by a launcher of `num_ranks` ranks, each of them `python -m hpcinfer *argv`.

    In a Slurm job's batch shell the launcher is srun, anywhere else the mpiexec beside this Python.

    Args:
        num_ranks: ranks; None under srun means what the job was submitted with.
        argv: arguments of `hpcinfer`, in every rank.
        mpi_flavour: srun's --mpi; by default pmi2 for MPICH and Intel MPI, pmix for Open MPI, cray_shasta for Cray's.
        srun_args: further arguments of srun.

    Raises:
        LaunchError: there is no launcher, or MPI was already initialised here.
    """
    if "mpi4py.MPI" in sys.modules:
        raise LaunchError("ranks cannot be started here", found="MPI is already initialised in this process")
    environment = LaunchEnvironment.from_environ()
    if environment.in_batch_shell and shutil.which("srun"):
        flavour = mpi_flavour or srun_flavour(_vendor_or_none() or "")
        command = srun_command(num_ranks, argv, environment.variables, flavour=flavour, srun_args=srun_args)
    else:
        if num_ranks is None:
            raise LaunchError("how many ranks to start is not known", fix="say how many")
        mpiexec = find_mpiexec()
        command = mpiexec_command(
            num_ranks, argv, environment.variables, mpiexec=mpiexec, vendor=mpiexec_vendor(mpiexec),
            num_cores=len(os.sched_getaffinity(0)), is_root=os.geteuid() == 0,
        )
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(command.argv[0], command.argv, command.env)


def mpiexec_command(
    num_ranks: int,
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    mpiexec: str,
    vendor: str,
    num_cores: int,
    is_root: bool = False,
) -> RankCommand:
    """The mpiexec that starts `num_ranks` ranks on this machine. Pure: it runs nothing."""
    if num_ranks < 1:
        raise LaunchError(f"{num_ranks} ranks", fix="start 1 or more")
    if num_ranks > MAX_RANKS_A_CORE * num_cores:
        raise LaunchError(
            f"{num_ranks} ranks on this machine alone", found=f"{num_cores} cores",
            fix=f"start it under srun or mpiexec on more nodes, or ask for at most {MAX_RANKS_A_CORE * num_cores} ranks",
        )
    env = clean_environ(environ)
    env.setdefault("OMP_NUM_THREADS", str(max(1, num_cores // num_ranks)))
    env.setdefault("OMP_WAIT_POLICY", "passive")
    if vendor == "Open MPI":
        # Its default is one rank a core, and it refuses more ranks than cores and root.
        options = ["--bind-to", "none"]
        env.setdefault("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe")
        if is_root:
            env.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
            env.setdefault("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    else:
        # Without both, Hydra finds Slurm by itself and waits for its controller.
        options = ["-rmk", "user", "-launcher", "fork"]
    return RankCommand(argv=[mpiexec, *options, "-n", str(num_ranks), *rank_program(argv)], env=env)


def srun_command(
    num_ranks: int | None,
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    flavour: str,
    srun_args: Sequence[str] = (),
) -> RankCommand:
    """The srun that starts ranks in this job. Pure: it runs nothing."""
    env = dict(environ)
    env.setdefault("OMP_WAIT_POLICY", "passive")
    # -K1: srun would otherwise leave the other ranks hanging when one dies.
    options = [f"--mpi={flavour}", "-K1"]
    if num_ranks is not None:
        options += ["-n", str(num_ranks)]
    if cores := environ.get("SLURM_CPUS_PER_TASK"):
        # Since Slurm 22.05 srun no longer takes it from the job.
        options.append(f"--cpus-per-task={cores}")
        env.setdefault("OMP_NUM_THREADS", cores)
    elif "OMP_NUM_THREADS" not in env:
        env["OMP_NUM_THREADS"] = str(_cores_per_task(num_ranks, environ))
    return RankCommand(argv=["srun", *options, *srun_args, *rank_program(argv)], env=env)


def rank_program(argv: Sequence[str]) -> list[str]:
    """The command of one rank."""
    return [sys.executable, "-m", "hpcinfer", *argv]


def clean_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` without the variables of another launcher."""
    return {
        name: value
        for name, value in environ.items()
        if not name.startswith(LAUNCHER_PREFIXES) or name.startswith(USER_PREFIXES)
    }


def find_mpiexec() -> str:
    """The mpiexec beside this Python (the MPI of this environment), else the first on PATH.

    Raises:
        LaunchError: there is none.
    """
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("mpiexec")
    if found is None:
        raise LaunchError(
            "several ranks on one machine need mpiexec",
            found=f"no mpiexec in {beside.parent} nor on PATH",
            fix="install an MPI into this environment: pip install '.[mpich]'",
        )
    return found


def mpiexec_vendor(mpiexec: str) -> str:
    """Whose mpiexec it is, from `mpiexec --version`: "MPICH" (Hydra; also Intel MPI) or "Open MPI".

    Raises:
        LaunchError: it does not run.
    """
    try:
        result = subprocess.run(
            [mpiexec, "--version"], capture_output=True, text=True, timeout=60, env=clean_environ(os.environ),
        )
    except (OSError, subprocess.TimeoutExpired) as cause:
        fix = "reinstall it: pip install '.[mpich]'"
        raise LaunchError(f"{mpiexec} does not run", found=str(cause), fix=fix) from cause
    text = result.stdout + result.stderr
    return "Open MPI" if "open mpi" in text.lower() or "openrte" in text.lower() or "prte" in text.lower() else "MPICH"


def _vendor_or_none() -> str | None:
    try:
        return mpiexec_vendor(find_mpiexec())
    except LaunchError:
        return None


def _cores_per_task(num_ranks: int | None, environ: Mapping[str, str]) -> int:
    """Cores of a node shared out over its tasks."""
    environment = LaunchEnvironment(environ)
    tasks = num_ranks or environment._number("SLURM_NTASKS", "SLURM_NPROCS") or 1
    nodes = environment._number("SLURM_JOB_NUM_NODES", "SLURM_NNODES") or 1
    cores = environment._number("SLURM_CPUS_ON_NODE") or 1
    return max(1, cores // -(-tasks // nodes))
