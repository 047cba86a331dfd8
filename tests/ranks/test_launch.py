"""How worlds end: errors, kills, signals, and launches that went wrong. Real processes, real signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.mpi import ROOT, alive, kill_tree, rank_env, run_ranks, start_world_process

PROGRAM = ["-m", "tests.ranks.launch_rank"]
NUM_RANKS = 3


@pytest.mark.parametrize(
    ("mode", "code", "report"),
    [
        (
            "error", 2,
            "error on rank 2 of 3 on host {host}\n"
            "ConfigError: the thing is wrong\n  found: 3 apples\n  fix:   take 4\n",
        ),
        ("bug", 1, "ZeroDivisionError"),
        ("early", 2, "error on rank 1 of 3 on host {host}\nConfigError: one rank fails before MPI is up"),
    ],
)
@pytest.mark.timeout(90)
def test_an_uncaught_exception_ends_all_ranks_with_one_report(tmp_path, mode, code, report):
    result = run_ranks(NUM_RANKS, [*PROGRAM, mode, tmp_path], timeout_s=60)
    assert result.returncode == code, result.output
    assert report.format(host=os.uname().nodename) in result.stderr
    assert result.stderr.count("hpcinfer: error on") == 1, result.stderr
    assert_gone(tmp_path, within_s=5)


@pytest.mark.timeout(90)
def test_an_error_is_over_within_five_seconds(tmp_path):
    process = start_world_process(NUM_RANKS, [*PROGRAM, "error", tmp_path])
    try:
        rank_pids(tmp_path)
        began = time.monotonic()
        process.communicate(timeout=30)
        assert time.monotonic() - began < 5
    finally:
        kill_tree(process.pid)


@pytest.mark.timeout(90)
def test_an_agreed_error_is_reported_by_rank_0_alone(tmp_path):
    result = run_ranks(NUM_RANKS, [*PROGRAM, "agreed", tmp_path], timeout_s=60)
    assert result.returncode == 2, result.output
    assert result.stderr.count("the job file is wrong") == 1, result.stderr
    assert "error on rank 0 of 3" in result.stderr


@pytest.mark.parametrize("mode", ["code", "exit"])
@pytest.mark.timeout(90)
def test_the_exit_code_arrives(tmp_path, mode):
    assert run_ranks(NUM_RANKS, [*PROGRAM, mode, tmp_path], timeout_s=60).returncode == 3


@pytest.mark.parametrize("victim", ["mpiexec", "proxy", "rank"])
@pytest.mark.timeout(90)
def test_a_kill_leaves_no_process_behind(tmp_path, victim):
    process = start_world_process(NUM_RANKS, [*PROGRAM, "collective", tmp_path])
    try:
        pids, parents = rank_pids(tmp_path)
        os.kill({"mpiexec": process.pid, "proxy": parents[0], "rank": pids[1]}[victim], signal.SIGKILL)
        assert_gone(tmp_path, within_s=5)
        process.communicate(timeout=30)
        assert process.returncode != 0
    finally:
        kill_tree(process.pid)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.timeout(90)
def test_a_signal_to_mpiexec_reaches_the_drain_flag_of_every_rank(tmp_path, number):
    process = start_world_process(NUM_RANKS, [*PROGRAM, "drain", tmp_path])
    try:
        wait_for(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(NUM_RANKS)), 60)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
        for rank in range(NUM_RANKS):
            assert f"drained rank {rank} by {number.name}" in stdout, stdout + stderr
        assert process.returncode == 3
    finally:
        kill_tree(process.pid)


@pytest.mark.timeout(90)
def test_a_world_of_one_where_srun_started_more_stops(tmp_path):
    variables = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}
    result = subprocess.run(
        [sys.executable, *PROGRAM, "fine", tmp_path], env=rank_env(variables), cwd=ROOT, capture_output=True, text=True,
        timeout=60,
    )
    assert result.returncode == 1
    assert "srun started 4 ranks, but each of them is alone" in result.stderr
    assert "srun --mpi=pmi2" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(60)
def test_a_rank_dies_with_its_parent():
    # The shell-like parent starts a rank and is killed; nobody tells the rank.
    child = (
        "import time; from hpcinfer.launch.process import die_with_parent\n"
        "die_with_parent(); print('up', flush=True); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid, flush=True); p.wait()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent], env=rank_env(), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        lines = {process.stdout.readline().strip(), process.stdout.readline().strip()}
        pid = int((lines - {"up"}).pop())
        process.kill()
        process.wait()
        wait_for(lambda: not alive(pid), 5)
    finally:
        process.stdout.close()
        kill_tree(process.pid)


@pytest.mark.timeout(90)
def test_start_ranks_becomes_mpiexec(tmp_path):
    # What `hpcinfer run` does alone on a machine, with a launcher's leftovers in the environment.
    # os.write, because the pieces that print() writes may mix where Python is unbuffered.
    rank = "import os; from mpi4py import MPI; os.write(1, b'%d of %d;' % (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size))"
    code = (
        "import sys; from hpcinfer.launch import start\n"
        f"start.rank_program = lambda argv: [sys.executable, '-c', {rank!r}]\n"
        "start.start_ranks(2, [])"
    )
    leftovers = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=rank_env(leftovers), cwd=ROOT, capture_output=True, text=True, timeout=60,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.split(";")) == ["", "0 of 2", "1 of 2"], result.stdout


@pytest.mark.timeout(60)
def test_ranks_are_ordered_by_node():
    # MPICH can pretend that odd and even ranks are on two nodes; a launcher may well place ranks round robin like this.
    code = (
        "from mpi4py import MPI; from hpcinfer.launch.topology import order_ranks\n"
        "o = order_ranks(MPI.COMM_WORLD)\n"
        "facts = MPI.COMM_WORLD.rank, o.rank, o.node_index, o.local_rank, o.num_nodes, o.local_size, o.size\n"
        "import os; os.write(1, f'{facts};'.encode())"
    )
    result = run_ranks(4, ["-c", code], timeout_s=40, env={"MPIR_CVAR_ODD_EVEN_CLIQUES": "1"}).check()
    assert sorted(result.stdout.split(";"))[1:] == [
        "(0, 0, 0, 0, 2, 2, 4)", "(1, 2, 1, 0, 2, 2, 4)", "(2, 1, 0, 1, 2, 2, 4)", "(3, 3, 1, 1, 2, 2, 4)",
    ]


def rank_pids(folder: Path) -> tuple[list[int], list[int]]:
    """Pids of the ranks and of their parents, once every rank has written them."""
    files = [folder / f"rank{rank}" for rank in range(NUM_RANKS)]
    wait_for(lambda: all(file.exists() and " " in file.read_text() for file in files), 60)
    pairs = [file.read_text().split() for file in files]
    return [int(pid) for pid, _ in pairs], [int(parent) for _, parent in pairs]


def assert_gone(folder: Path, within_s: float) -> None:
    pids = [int(file.read_text().split()[0]) for file in folder.glob("rank*")]
    wait_for(lambda: not any(alive(pid) for pid in pids), within_s)


def wait_for(condition, timeout_s: float) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, f"not within {timeout_s} s"
        time.sleep(0.05)
