"""What a process learns from its environment variables."""

import pytest

from hpcinfer.launch.env import LaunchEnvironment, expand_node_list

JOB = {"SLURM_JOB_ID": "71", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "8"}
BATCH_SHELL = {**JOB, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STEP = {**JOB, "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "6", "SLURM_PROCID": "5", "SLURM_LOCALID": "2"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "4", "PMI_FD": "9", "MPI_LOCALNRANKS": "4", "MPI_LOCALRANKID": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "2", "PMIX_RANK": "2", "PRTE_LAUNCHED": "1"}


@pytest.mark.parametrize(
    ("variables", "launcher", "expected", "rank", "batch_shell"),
    [
        ({}, "none", 1, 0, False),
        (BATCH_SHELL, "none", 1, 0, True),
        (JOB, "none", 1, 0, True),  # salloc
        ({**BATCH_SHELL, "SLURM_STEP_ID": "4294967291"}, "none", 1, 0, True),  # the batch step
        ({**JOB, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, "none", 1, 0, True),  # interactive step
        (STEP, "srun", 6, 5, False),
        ({**STEP, "PMI_RANK": "5", "PMI_SIZE": "6", "PMI_FD": "8"}, "srun", 6, 5, False),  # srun --mpi=pmi2
        (HYDRA, "mpiexec", 4, 1, False),
        (OPEN_MPI, "mpiexec", 3, 2, False),
        # mpiexec inside an allocation: Hydra starts its proxies with srun, one task a node.
        ({**STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", **HYDRA}, "mpiexec", 4, 1, False),
        ({**BATCH_SHELL, **OPEN_MPI}, "mpiexec", 3, 2, False),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "mpiexec", 2, 0, False),  # another PMI launcher
        ({"PMIX_RANK": "1"}, "mpiexec", 1, 0, False),
        ({**STEP, "PMIX_RANK": "5"}, "srun", 6, 5, False),  # srun --mpi=pmix
    ],
)
def test_launcher(variables, launcher, expected, rank, batch_shell):
    environment = LaunchEnvironment(variables)
    assert environment.launcher == launcher
    assert environment.expected_ranks == expected
    assert environment.launcher_rank == rank
    assert environment.in_batch_shell == batch_shell


def test_facts_of_a_job():
    environment = LaunchEnvironment({**STEP, "SLURM_RESTART_COUNT": "2", "SLURM_JOB_END_TIME": "1790000000"})
    assert environment.job_id == 71
    assert environment.step_id == 3
    assert environment.restart_count == 2
    assert environment.walltime_end_s == 1790000000
    assert environment.nodes == ("n1", "n2")


def test_how_commands_know_an_array_task():
    """Its last task has the number of the whole array."""
    task = LaunchEnvironment({**STEP, "SLURM_ARRAY_JOB_ID": "71", "SLURM_ARRAY_TASK_ID": "3", "SLURM_CLUSTER_NAME": "big"})
    assert (task.job_reference, task.cluster, task.array_id) == ("71_3", "big", 71)
    assert LaunchEnvironment(STEP).array_id is None
    assert LaunchEnvironment(STEP).job_reference == "71"
    assert LaunchEnvironment({}).job_reference == LaunchEnvironment({}).cluster == ""


def test_a_given_end_comes_before_slurms():
    assert LaunchEnvironment({"HPCINFER_END_TIME": "5", "SLURM_JOB_END_TIME": "7"}).walltime_end_s == 5


def test_facts_outside_a_job():
    environment = LaunchEnvironment({"SLURM_JOB_ID": "", "SLURM_RESTART_COUNT": "nonsense"})
    assert environment.job_id is None
    assert environment.step_id is None
    assert environment.restart_count == 0
    assert environment.walltime_end_s is None
    assert environment.nodes == ()
    assert environment.visible_devices is None
    assert LaunchEnvironment({"CUDA_VISIBLE_DEVICES": "0,1"}).visible_devices == ("0", "1")
    assert LaunchEnvironment({"CUDA_VISIBLE_DEVICES": ""}).visible_devices == ()


@pytest.mark.parametrize(
    ("compressed", "names"),
    [
        ("", ()),
        ("n1", ("n1",)),
        ("n[1-2,07],gpu3", ("n1", "n2", "n07", "gpu3")),
        ("c[098-101]", ("c098", "c099", "c100", "c101")),
        ("r[1-2]n[0-1]", ("r1n0", "r1n1", "r2n0", "r2n1")),
        ("a[1,3]-x", ("a1-x", "a3-x")),
    ],
)
def test_expand_node_list(compressed, names):
    assert expand_node_list(compressed) == names
