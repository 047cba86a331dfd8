"""`hpcinfer doctor` on real ranks: a healthy world, worlds that never were, ranks that stop answering."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tests.doctor_world import TWO_NODES, RankStart, examine_process, examine_world, need_mpich
from tests.mpi import NCCL_STAND_IN, ROOT, rank_env, run_ranks

RANK = ("-m", "tests.ranks.doctor_rank")


def own_output(tmp_path):
    """The demo job as on a machine without GPUs and InfiniBand."""
    settings = ["--set", f"data.output={tmp_path / 'run'}", "--set", "engine.device=cpu"]
    return ["jobs/demo.toml", *settings, "--sys-root", str(tmp_path / "no-fabric")]


@pytest.mark.timeout(120)
def test_a_healthy_world_of_two_nodes(tmp_path):
    need_mpich()
    examined = examine_world([RankStart()] * 4, own_output(tmp_path), env=TWO_NODES)
    report = examined.report
    assert examined.faults == {} and (report["ranks"], report["nodes"]) == (4, 2) and report["seconds"] < 60, examined.output
    assert examined.returncode == (0 if report["ok"] else 1) and report["ok"] == (report["counts"]["red"] == 0)
    green = examined.of("green")
    assert "one world of 4 ranks" in green["MPI world"]["found"] and green["ranks a node"]["found"] == "2 nodes x 2 ranks"
    assert green["versions"]["found"].startswith("equal on all ranks")
    assert "went to one of 4 ranks" in green["output: exclusive names"]["found"]
    for check in ("output: shared", "model on all nodes", "clocks", "layout", "weights and K/V", "file handles"):
        assert check in green, examined.output
    # Figures of links depend on what else the machine does; there must be some.
    for check in ("links inside nodes", "links between nodes"):
        assert any(each["check"] == check and "all-reduce" in each["found"] for each in report["findings"]), examined.output
    assert list(tmp_path.iterdir()) == [], "nothing stays behind"


def srun_variables(rank: int, num_ranks: int = 2) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(num_ranks), "SLURM_PROCID": str(rank),
        "SLURM_MPI_TYPE": "none",
    }


@pytest.mark.timeout(60)
def test_the_wrong_mpi_plugin_is_a_red_finding_within_seconds(tmp_path):
    """What srun does without a plugin that the MPI knows: two worlds of one rank. One of them speaks."""
    command = [sys.executable, "-m", "hpcinfer", "doctor", "--json", *own_output(tmp_path)]
    began = time.monotonic()
    other = subprocess.Popen(
        command, env=rank_env(srun_variables(1)), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        examined = examine_process(command, rank_env(srun_variables(0)), timeout_s=50)
        silence, _ = other.communicate(timeout=30)
    finally:
        other.kill()
        other.wait()
    assert examined.returncode == 1, examined.output
    red = examined.of("red")
    assert list(red) == ["MPI world"], examined.output
    assert "srun started 2 ranks, but each of them is alone" in red["MPI world"]["found"]
    assert "srun --mpi=" in red["MPI world"]["fix"]
    assert (other.returncode, silence) == (0, b""), "it must not end srun before the other has spoken"
    assert examined.report["seconds"] < 10 and time.monotonic() - began < 50
    assert examined.levels["model files"] == "green", "what one rank can see is examined all the same"


@pytest.mark.full
@pytest.mark.timeout(60)
def test_ranks_that_never_meet_in_mpi(tmp_path):
    """One of two ranks does not come to MPI at all: the other one's report does not wait for it."""
    need_mpich()
    starts = [RankStart(env={"DOCTOR_TEST_FAULT": "impatient"}), RankStart(env={"DOCTOR_TEST_FAULT": "late"})]
    examined = examine_world(starts, own_output(tmp_path), program=RANK, timeout_s=50)
    assert examined.returncode != 0
    red = examined.of("red")
    assert list(red) == ["MPI world"] and "did not meet in MPI" in red["MPI world"]["found"], examined.output


@pytest.mark.full
@pytest.mark.timeout(90)
def test_a_rank_that_stops_answering_is_named(tmp_path):
    """What is known by then is told; the others end."""
    need_mpich()
    faults = ["impatient", "impatient silent", "impatient", "impatient"]
    starts = [RankStart(env={"DOCTOR_TEST_FAULT": fault}) for fault in faults]
    examined = examine_world(starts, own_output(tmp_path), env=TWO_NODES, program=RANK, timeout_s=60)
    assert examined.returncode == 1, examined.output
    red = examined.of("red")
    assert list(red) == ["stuck: job"], examined.output
    # The second to be started is the first on the second node: rank 2.
    found = red["stuck: job"]["found"]
    assert "rank 2 on" in found and "did not come to the examination of the files of" in found and "1 of 4 ranks" in found
    assert examined.levels["MPI world"] == examined.levels["versions"] == examined.levels["output: write"] == "green"
    assert "model files" not in examined.levels


@pytest.mark.full
@pytest.mark.timeout(60)
def test_a_rank_that_is_stuck_itself_is_spoken_for(tmp_path):
    """Alone, in a file system that does not answer."""
    command = [sys.executable, *RANK, "doctor", "--json", *own_output(tmp_path)]
    examined = examine_process(command, rank_env({"DOCTOR_TEST_FAULT": "impatient silent"}), timeout_s=50)
    assert examined.returncode != 0
    red = examined.of("red")
    assert list(red) == ["stuck: job"] and "got no answer" in red["stuck: job"]["found"], examined.output
    assert examined.levels["output: write"] == "green"


@pytest.mark.full
@pytest.mark.timeout(120)
@pytest.mark.parametrize("transport", ["NCCL", "MPI"])
def test_links_are_measured_in_an_order_that_ends(transport):
    """Sends that wait for their receives, on NCCL's stand-in too: an order that deadlocks there would on a cluster."""
    need_mpich()
    env = {**TWO_NODES, **(NCCL_STAND_IN if transport == "NCCL" else {})}
    result = run_ranks(4, ["-m", "tests.ranks.doctor_links_rank"], timeout_s=100, env=env).check()
    assert f"4 ranks measured over {transport}" in result.stdout
