"""Who is missing: between parts of the examination each rank answers for itself, so that a silent one can be named."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from hpcinfer.comm.bootstrap import World
from hpcinfer.comm.mpi_library import load_mpi
from hpcinfer.doctor.finding import RankPlace, who
from hpcinfer.errors import CommunicationError

GRACE_S = 5.0
"""By so much the other ranks wait longer than rank 0, which has more to say."""
_TAG = 11
_PAUSE_S = 0.001


def roll_call(world: World, places: Sequence[RankPlace], part: str, *, deadline_s: float) -> None:
    """Return when all ranks have called it. Collective.

    Args:
        places: of all ranks, in rank order.
        part: what comes next, for the message.
        deadline_s: how long rank 0 waits.

    Raises:
        CommunicationError: ranks did not come; on rank 0 it names them.
    """
    if world.size == 1:
        return
    answer = None
    if world.rank == 0:
        missing = _listen(world, deadline_s)
        if missing:
            raise CommunicationError(
                f"{who([places[rank] for rank in missing])} did not come to the examination of {part}",
                found=f"{len(missing)} of {world.size} ranks were not there after {deadline_s:g} s",
                fix="look at the processes there (stuck in a file system, stopped, swapped out), or leave those nodes out: "
                "sbatch --exclude",
            )
    else:
        answer = world.mpi_comm.Isend(np.zeros(1, np.int8), 0, _TAG)
    world.channel.barrier(deadline_s=deadline_s + GRACE_S)
    if answer is not None:
        answer.Wait()  # rank 0 has it, or the barrier would not be over


def _listen(world: World, deadline_s: float) -> list[int]:
    """Take the answers of the others; the ranks of which none came."""
    MPI = load_mpi()
    missing, status, incoming = set(range(1, world.size)), MPI.Status(), np.empty(1, np.int8)
    end_s = time.monotonic() + deadline_s
    while missing and time.monotonic() < end_s:
        if world.mpi_comm.Iprobe(source=MPI.ANY_SOURCE, tag=_TAG, status=status):
            world.mpi_comm.Recv(incoming, status.Get_source(), _TAG)
            missing.discard(status.Get_source())
        else:
            time.sleep(_PAUSE_S)
    return sorted(missing)
