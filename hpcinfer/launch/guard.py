"""The check that catches the commonest silent failure on clusters: N worlds of one rank instead of one world of N."""

from __future__ import annotations

import time

from hpcinfer.errors import LaunchError
from hpcinfer.launch.env import LaunchEnvironment

LINGER_S = 4.0
"""Ranks that do not report wait so long for the one that does: `srun -K1` would kill it when they end first. Whoever waits for
the launch to end waits as long."""


def check_world(environment: LaunchEnvironment, world_size: int, world_rank: int, *, vendor: str = "") -> None:
    """Stop where MPI has a world of one rank and the launcher started more.

    Args:
        environment: of this process.
        world_size, world_rank: what MPI says.
        vendor: name of the MPI library, for the message.

    Raises:
        LaunchError: `agreed` is set on it, because every rank of such a launch raises the same: the one that the
            launcher calls rank 0 at once, the others a little later.
    """
    error = singleton_error(environment, world_size, world_rank, vendor=vendor)
    if error is None:
        return
    linger(environment)
    raise error


def linger(environment: LaunchEnvironment) -> None:
    """Called before an error is raised that every rank of the launch is likely to have: leaves time to the rank that the launcher
    calls 0, which does not wait, to report it and to end the others."""
    if environment.launcher_rank != 0:
        time.sleep(LINGER_S)


def singleton_error(
    environment: LaunchEnvironment, world_size: int, world_rank: int, *, vendor: str = ""
) -> LaunchError | None:
    """What is wrong where MPI has a world of one rank and the launcher started more; see `check_world`."""
    expected = environment.expected_ranks
    if world_size != 1 or expected <= 1:
        return None
    library = vendor or "the MPI of this environment"
    if environment.launcher == "srun":
        fix = (
            f"start with srun --mpi={srun_flavour(vendor)} ({library}; MPICH and Intel MPI take pmi2, Open MPI pmix, Cray's cray_shasta), "
            "see `srun --mpi=list`, and keep one MPI per environment"
        )
    else:
        fix = (
            f"this environment's MPI is {library}: use the mpiexec that came with it, and keep one MPI per environment"
        )
    error = LaunchError(
        f"{environment.launcher} started {expected} ranks, but each of them is alone in an MPI world of one rank",
        found=f"world size {world_size}, world rank {world_rank}; {environment.launcher} started {expected} ranks",
        fix=fix,
    )
    error.agreed = True
    return error


def srun_flavour(vendor: str) -> str:
    """The value of `srun --mpi` for an MPI library: pmix for Open MPI, cray_shasta for Cray's, pmi2 for MPICH and its kin."""
    vendor = vendor.lower()
    return "pmix" if "open mpi" in vendor else "cray_shasta" if "cray" in vendor else "pmi2"
