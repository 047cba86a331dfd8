"""Into the world: what keeps ranks from becoming one world is a finding, not an end."""

from __future__ import annotations

import os
import time

from hpcinfer.comm.bootstrap import World, local_world, start_world
from hpcinfer.comm.mpi_library import load_mpi
from hpcinfer.doctor.finding import Finding, red, red_error
from hpcinfer.errors import LaunchError
from hpcinfer.launch.env import LaunchEnvironment
from hpcinfer.launch.guard import singleton_error
from hpcinfer.launch.process import die_with_parent
from hpcinfer.launch.report import Place

START_S = 40.0
"""How long ranks may take to meet in MPI; slow file systems make some import late."""
LINGER_S = 3.0
"""Ranks that do not print wait so long for the one that does: launchers may kill it when they end first."""


def enter(environment: LaunchEnvironment, place: Place) -> tuple[World | None, list[Finding]]:
    """The world that this process is a rank of, and what was wrong with it.

    Where MPI does not load, or each rank is alone in its world, the rank that the launcher calls 0 goes on in a world of its
    own, so that it can say so beside everything else that it finds.

    Args:
        place: filled in, so that errors can be reported from the right rank and end all ranks.

    Returns:
        None for a rank that has nothing to do.

    Raises:
        LaunchError: on the other ranks, where MPI could not be loaded.
    """
    if environment.launcher == "none":
        return local_world(), []
    die_with_parent()
    is_first = environment.launcher_rank == 0
    try:
        MPI = load_mpi()
    except LaunchError as error:
        if not is_first:
            place.abort = os._exit  # this rank alone: the first goes on for as long as its examination takes
            time.sleep(LINGER_S)
            raise
        place.size = 1
        return local_world(), [red_error("MPI library", error)]
    comm = MPI.COMM_WORLD
    error = singleton_error(environment, comm.Get_size(), comm.Get_rank(), vendor=MPI.get_vendor()[0])
    if error is not None:
        place.size = 1
        return (local_world(), [red_error("MPI world", error)]) if is_first else (None, [])
    world = start_world(environment=environment)
    place.rank, place.size, place.host, place.abort = world.rank, world.size, world.host, world.abort
    return world, []


def never_met(environment: LaunchEnvironment) -> Finding:
    """What is the matter where the world does not come into being."""
    return red(
        "MPI world",
        f"the {environment.expected_ranks} ranks of {environment.launcher} did not meet in MPI within {START_S:g} s",
        "look for a rank that could not start (its error is above), for a firewall between the nodes, and for a network "
        "device that some nodes lack (UCX_NET_DEVICES, FI_PROVIDER); see `srun --mpi=list`",
    )
