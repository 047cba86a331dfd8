"""The guard against worlds of one rank."""

import pytest

from hpcinfer.errors import LaunchError
from hpcinfer.launch import guard
from hpcinfer.launch.env import LaunchEnvironment

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("variables", "size"),
    [
        ({}, 1), (STEP, 4), (STEP, 2),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, 1), ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, 1),
    ],
)
def test_passes(variables, size):
    guard.check_world(LaunchEnvironment(variables), size, 0)


@pytest.mark.parametrize(
    ("vendor", "flavour"), [("Open MPI", "pmix"), ("MPICH", "pmi2"), ("Intel MPI", "pmi2"), ("Cray MPICH", "cray_shasta")]
)
def test_srun_with_the_wrong_flavour(vendor, flavour):
    with pytest.raises(LaunchError) as caught:
        guard.check_world(LaunchEnvironment(STEP), 1, 0, vendor=vendor)
    text = str(caught.value)
    assert f"srun --mpi={flavour}" in text and vendor in text and text.count("cray_shasta") == 1 + (vendor == "Cray MPICH")
    assert "srun started 4 ranks" in text and "one MPI per environment" in text
    assert caught.value.agreed


def test_mpiexec_of_another_mpi():
    environment = LaunchEnvironment({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"})
    with pytest.raises(LaunchError, match="use the mpiexec that came with it"):
        guard.check_world(environment, 1, 0, vendor="MPICH")


def test_ranks_that_do_not_report_wait_for_the_one_that_does(monkeypatch):
    slept = []
    monkeypatch.setattr(guard.time, "sleep", slept.append)
    with pytest.raises(LaunchError):
        guard.check_world(LaunchEnvironment({**STEP, "SLURM_PROCID": "3"}), 1, 0)
    assert slept == [guard.LINGER_S]
