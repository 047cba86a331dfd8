"""Loading MPI in a rank that a launcher started. With real launchers: tests/ranks/test_launch.py, tests/slurm/test_launches.py."""

from __future__ import annotations

import types

import pytest

from hpcinfer.comm import mpi_library
from hpcinfer.comm.mpi_library import load_launched_mpi
from hpcinfer.errors import LaunchError
from hpcinfer.launch import guard
from hpcinfer.launch.env import LaunchEnvironment


def launched(rank: int) -> LaunchEnvironment:
    return LaunchEnvironment({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank)})


@pytest.fixture
def slept(monkeypatch):
    """What a rank has slept."""
    seconds = []
    monkeypatch.setattr(guard.time, "sleep", seconds.append)
    return seconds


@pytest.mark.parametrize("rank", [0, 1])
def test_without_mpi_the_first_rank_says_so_first(monkeypatch, slept, rank):
    def fail():
        raise LaunchError("no MPI")

    monkeypatch.setattr(mpi_library, "load_mpi", fail)
    with pytest.raises(LaunchError, match="no MPI"):
        load_launched_mpi(launched(rank))
    assert slept == [guard.LINGER_S] * rank


@pytest.mark.parametrize(("size", "alone"), [(2, False), (1, True)])
def test_the_world_is_checked_against_the_launcher(monkeypatch, slept, size, alone):
    comm = types.SimpleNamespace(Get_size=lambda: size, Get_rank=lambda: 0)
    mpi = types.SimpleNamespace(COMM_WORLD=comm, get_vendor=lambda: ("MPICH", (5, 0, 0)))
    monkeypatch.setattr(mpi_library, "load_mpi", lambda: mpi)
    if alone:
        with pytest.raises(LaunchError, match="alone in an MPI world of one rank"):
            load_launched_mpi(launched(0))
    else:
        assert load_launched_mpi(launched(0)) is mpi
    assert slept == []
