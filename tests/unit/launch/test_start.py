"""The commands that start ranks, built without running them."""

import os
import subprocess
import sys

import pytest

from hpcinfer.errors import LaunchError
from hpcinfer.launch import start

LEFTOVERS = {
    "SLURM_JOB_ID": "7", "PMI_RANK": "0", "PMIX_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "HYDI_CONTROL_FD": "7",
    "MPI_LOCALNRANKS": "2", "PRTE_LAUNCHED": "1",
}


def mpich(num_ranks=2, environ=None, **settings):
    settings = {"mpiexec": "/venv/bin/mpiexec", "vendor": "MPICH", "num_cores": 8, **settings}
    return start.mpiexec_command(num_ranks, ["run", "a job.toml"], environ or {}, **settings)


def test_mpich():
    command = mpich(3)
    assert command.argv == [
        "/venv/bin/mpiexec", "-rmk", "user", "-launcher", "fork", "-n", "3",
        sys.executable, "-m", "hpcinfer", "run", "a job.toml",
    ]
    assert command.env == {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}


def test_more_ranks_than_cores_get_a_thread_each():
    assert mpich(16).env["OMP_NUM_THREADS"] == "1"


def test_variables_of_the_user_stay_and_those_of_launchers_go():
    kept = {"HOME": "/root", "OMP_NUM_THREADS": "5", "OMP_WAIT_POLICY": "active", "OMPI_MCA_btl": "tcp", "UCX": "x"}
    assert mpich(environ={**LEFTOVERS, **kept}).env == kept


def test_open_mpi():
    command = mpich(4, vendor="Open MPI", is_root=True)
    assert command.argv[:5] == ["/venv/bin/mpiexec", "--bind-to", "none", "-n", "4"]
    assert command.env["PRTE_MCA_rmaps_default_mapping_policy"] == ":oversubscribe"
    assert command.env["OMPI_ALLOW_RUN_AS_ROOT"] == command.env["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] == "1"
    assert "OMPI_ALLOW_RUN_AS_ROOT" not in mpich(vendor="Open MPI").env


def test_no_ranks():
    with pytest.raises(LaunchError, match="start 1 or more"):
        mpich(0)


def test_srun():
    command = start.srun_command(None, ["run"], {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "4"}, flavour="pmi2")
    assert command.argv == ["srun", "--mpi=pmi2", "-K1", "--cpus-per-task=4", sys.executable, "-m", "hpcinfer", "run"]
    assert command.env["SLURM_JOB_ID"] == "7"
    assert command.env["OMP_NUM_THREADS"] == "4"
    command = start.srun_command(
        8, [], {"SLURM_CPUS_ON_NODE": "16", "SLURM_JOB_NUM_NODES": "2"}, flavour="pmix", srun_args=["--gpus-per-node=4"]
    )
    assert command.argv[:6] == ["srun", "--mpi=pmix", "-K1", "-n", "8", "--gpus-per-node=4"]
    assert command.env["OMP_NUM_THREADS"] == "4"


def test_no_mpiexec(monkeypatch, tmp_path):
    monkeypatch.setattr(start.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"pip install '\.\[mpich\]'"):
        start.find_mpiexec()


def test_mpiexec_beside_python_comes_first(monkeypatch, tmp_path):
    monkeypatch.setattr(start.sys, "executable", str(tmp_path / "python"))
    beside = tmp_path / "mpiexec"
    beside.write_text("#!/bin/sh\necho 'mpiexec (Open MPI) 5.0.11'\n")
    beside.chmod(0o755)
    assert start.find_mpiexec() == str(beside)
    assert start.mpiexec_vendor(str(beside)) == "Open MPI"
    beside.write_text("#!/bin/sh\necho 'HYDRA build details:'\n")
    assert start.mpiexec_vendor(str(beside)) == "MPICH"


def test_mpiexec_that_does_not_run(tmp_path):
    with pytest.raises(LaunchError, match="does not run"):
        start.mpiexec_vendor(str(tmp_path / "mpiexec"))


def test_start_replaces_the_process(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    calls = []
    monkeypatch.setattr(start.os, "execvpe", lambda *arguments: calls.append(arguments))
    start.start_ranks(2, ["run", "job.toml"])
    [(path, argv, env)] = calls
    assert path == argv[0] == start.find_mpiexec()
    assert argv[-5:] == [sys.executable, "-m", "hpcinfer", "run", "job.toml"]
    assert not any(name.startswith("SLURM_") for name in env)
    with pytest.raises(LaunchError, match="how many"):
        start.start_ranks(None, [])
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(start.shutil, "which", lambda name: f"/usr/bin/{name}")
    start.start_ranks(None, ["run"], mpi_flavour="cray_shasta")
    assert calls[1][1][:3] == ["srun", "--mpi=cray_shasta", "-K1"]


def test_launch_is_free_of_torch_and_mpi():
    code = (
        "import sys, importlib\n"
        "for name in 'env guard process report signals start topology'.split():\n"
        "    importlib.import_module('hpcinfer.launch.' + name)\n"
        "assert 'torch' not in sys.modules and 'mpi4py' not in sys.modules and 'numpy' not in sys.modules, 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
