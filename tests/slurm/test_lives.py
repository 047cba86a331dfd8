"""How a batch script ends and goes on, on a real cluster, with ranks that only pretend (`fake_rank.py`)."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import wait_for, wait_for_empty_queue


def test_plans_of_lives(cluster, fakes):
    """All at once, since most of the time is Slurm's own pause before a requeued job begins again."""
    plans = {
        "drained": ("commit+drain,done", {"signal_s": 58}),
        "stuck": ("nothing+3", {}),
        "recovers": ("nothing+3,commit+3,done", {}),
        "fails": ("commit+1", {}),
        "unmarked": ("commit+0,done", {}),
        "killed": ("commit+kill,done", {}),
        "bounded": ("commit+3", {"max_lives": 2}),
        "early": ("late+commit+drain,done", {}),
    }
    jobs = {name: fakes.submit(name, plan, slurm=slurm)[0] for name, (plan, slurm) in plans.items() if name != "drained"}
    jobs["drained"] = fakes.submit("drained", plans["drained"][0], "--time", "1", slurm=plans["drained"][1])[0]
    cluster.wait(jobs["early"], "RUNNING")
    cluster.run("scancel", "--signal=USR1", "--batch", str(jobs["early"]))
    ends = {name: cluster.wait(job, within_s=150) for name, job in jobs.items()}
    found = {name: (end["JobState"], end["ExitCode"], fakes.lives(name)) for name, end in ends.items()}
    everything = "\n".join(fakes.log(name) for name in jobs)
    assert found == {
        "drained": ("COMPLETED", "0:0", 2),
        "stuck": ("FAILED", "1:0", 2),
        "recovers": ("COMPLETED", "0:0", 3),
        "fails": ("FAILED", "1:0", 1),
        "unmarked": ("COMPLETED", "0:0", 2),
        "killed": ("COMPLETED", "0:0", 2),
        "bounded": ("FAILED", "3:0", 2),
        "early": ("COMPLETED", "0:0", 2),
    }, everything
    assert "fake rank stopped by SIGUSR1" in fakes.log("drained")
    assert "fake rank stopped by SIGUSR1" in fakes.log("early"), "a warning before the ranks were ready is lost, or has ended them"
    assert "committed nothing" in fakes.log("stuck")
    assert "life 2: the run is complete" in fakes.log("killed")


def test_nodes_that_are_not_filled_have_whole_replicas(cluster, fakes):
    job, = fakes.submit("uneven", "done", "--set", "parallel.tp=2", "--set", "parallel.dp=3", slurm={"ranks_per_node": 4})
    assert cluster.wait(job)["JobState"] == "COMPLETED", fakes.log("uneven")
    ranks = [json.loads(path.read_text())["env"] for path in fakes.run("uneven").glob("rank-*.json")]
    nodes = {int(env["SLURM_PROCID"]): env["SLURM_NODEID"] for env in ranks}
    assert nodes == {0: "0", 1: "0", 2: "0", 3: "0", 4: "1", 5: "1"}


def ends(cluster: Cluster, name: str) -> list[tuple[str, str]]:
    """(state, exit code) of all jobs of this name, in the order of their numbers."""
    records = [record for record in cluster.records() if record["Name"] == name]
    return [(record["JobState"], record["ExitCode"]) for record in sorted(records, key=lambda record: int(record["JobId"]))]


def test_successors(cluster, fakes):
    forbidden = {"requeue": False}
    fakes.variables = {"SLURM_LEFTOVER": "of an earlier job"}
    [chain] = fakes.submit("chain", "commit+3,done", slurm=forbidden)
    fakes.submit("failing", "1", slurm=forbidden)
    fakes.submit("hopeless", "nothing+3", slurm=forbidden)
    fakes.submit("last", "commit+3", slurm={**forbidden, "max_lives": 2})
    [stopped] = fakes.submit("stopped", "commit+drain", slurm=forbidden)
    pair = fakes.submit("pair", "commit+drain,commit+drain,done", "--array", "2", slurm=forbidden)
    assert len(pair) == 2
    wait_for(lambda: fakes.lives("pair") == 2 and fakes.lives("stopped") == 1)
    for job in pair:
        cluster.run("scancel", "--signal=USR1", "--batch", str(job))
    cluster.run("scancel", str(stopped))
    wait_for_empty_queue(cluster, fakes.folder)
    done, again, cancelled, failed = ("COMPLETED", "0:0"), ("FAILED", "3:0"), ("CANCELLED", "0:0"), ("FAILED", "1:0")
    # Each life has submitted the next before it began; the one that is too many is cancelled.
    assert ends(cluster, "chain") == [again, done, cancelled], fakes.log("chain")
    assert ends(cluster, "failing") == [failed, cancelled], fakes.log("failing")
    assert ends(cluster, "hopeless") == [again, failed, cancelled], fakes.log("hopeless")
    assert ends(cluster, "last") == [again, again], fakes.log("last")
    # Its successor may have begun before it was cancelled, with one of its own.
    assert set(ends(cluster, "stopped")) == {cancelled}, fakes.log("stopped")
    assert ends(cluster, "pair-1") == ends(cluster, "pair-2") == [again, done, cancelled], fakes.log("pair")
    lives = [json.loads(path.read_text()) for path in fakes.run("chain").glob("rank-*.json")]
    assert {rank["env"]["SLURM_JOB_ID"] == str(chain): rank["env"].get("SLURM_LEFTOVER") for rank in lives} == {
        True: "of an earlier job", False: None,
    }  # fmt: skip


def test_the_loss_of_a_node(cluster, fakes):
    """Slurm requeues the job itself, and where it may not, the successor is there already."""
    jobs = {
        name: fakes.submit(name, "commit+drain,done", slurm={"requeue": requeue, "options": ["--nodelist=n1"]})[0]
        for name, requeue in (("requeued", True), ("succeeded", False))
    }
    wait_for(lambda: all(fakes.lives(name) == 1 for name in jobs))
    cluster.set_node("n1", "down")  # with the batch shells
    cluster.set_node("n1", "resume")
    wait_for_empty_queue(cluster, fakes.folder)
    assert ends(cluster, "succeeded") == [("NODE_FAIL", "0:0"), ("COMPLETED", "0:0"), ("CANCELLED", "0:0")], fakes.log("succeeded")
    record = cluster.job(jobs["requeued"])
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "1"), fakes.log("requeued")
    successors = {"requeued": "", "succeeded": f" as job {jobs['succeeded'] + 1}"}
    for name in jobs:
        # The first life may be too dead to say anything.
        said = set(re.findall("hpcinfer: .*life 1: (.*)", fakes.log(name)))
        assert said <= {f"ended by Slurm, which starts it again{successors[name]}"}, fakes.log(name)
        assert "life 2: the run is complete" in fakes.log(name)


def test_an_array_task_acts_for_itself(cluster, fakes):
    """The number of its last task is that of the whole array: what goes by that number would hit the others too."""
    [array] = fakes.submit("array", "commit+drain", "--array", "3")
    wait_for(lambda: fakes.lives("array") == 3)

    def tasks() -> dict[str, tuple[str, str]]:
        return {task["ArrayTaskId"]: (task["JobState"], task["Restarts"]) for task in cluster.tasks(array)}

    [last] = [task["ArrayTaskId"] for task in cluster.tasks(array) if task["JobId"] == str(array)]
    first, second = sorted(tasks().keys() - {last})
    cluster.run("scancel", f"{array}_{first}")
    wait_for(lambda: tasks()[first][0] == "CANCELLED")
    # A drained one comes back, alone.
    cluster.run("scancel", "--signal=USR1", "--batch", f"{array}_{last}")
    wait_for(lambda: tasks()[last] == ("RUNNING", "1"), within_s=30)
    assert tasks() == {first: ("CANCELLED", "0"), second: ("RUNNING", "0"), last: ("RUNNING", "1")}, fakes.log("array")
    # The cancelled one that has the array's number stays away too.
    cluster.run("scancel", f"{array}_{last}")
    wait_for(lambda: tasks()[last][0] == "CANCELLED")
    time.sleep(1)
    assert tasks() == {first: ("CANCELLED", "0"), second: ("RUNNING", "0"), last: ("CANCELLED", "1")}, fakes.log("array")
    cluster.run("scancel", str(array))
    cluster.wait(array)


def test_what_the_ranks_get(cluster, fakes, tmp_path):
    """GPUs, cores, variables, limits, and an environment that is unpacked on every node's own disk."""
    environment = tmp_path / "environment"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python3").write_text(Path(fakes.environment["python"]).read_text())
    (environment / "bin" / "python3").chmod(0o755)
    tar = tmp_path / "the environment.tar"
    subprocess.run(["tar", "-cf", tar, "-C", environment, "."], check=True)
    local = cluster.local / "scratch of $SLURM_JOB_USER"
    fakes.environment = {"setup": ["setup_ran=1"], "variables": {"UCX_TLS": "tcp,self", "FI_PROVIDER": "site's"}}
    slurm = {"gpus_per_node": 2, "ranks_per_node": 2, "cores_per_rank": 3, "options": ["--comment=a # \"b\" \\c", "--export=ALL"]}
    scratch = {"folder": str(local), "environment_tar": str(tar)}
    fakes.variables = {"FI_PROVIDER": "the user's", "NCCL_DEBUG": "INFO"}
    [job] = fakes.submit("given", "done", "--nodes", "2", slurm=slurm, scratch=scratch, nccl={"interface": "lo", "debug": "WARN"})
    record = cluster.wait(job)
    assert record["JobState"] == "COMPLETED", fakes.log("given")
    assert record["Comment"].strip() == 'a # "b" \\c'
    ranks = [json.loads(path.read_text()) for path in fakes.run("given").glob("rank-*.json")]
    assert sorted(rank["env"]["SLURMD_NODENAME"] for rank in ranks) == ["n1", "n1", "n2", "n2"]
    for rank in ranks:
        env = rank["env"]
        assert env["CUDA_VISIBLE_DEVICES"] == "0,1"
        assert env["OMP_NUM_THREADS"] == "1"  # the user's, of the tests; the site's cores are what srun gives
        assert env["SLURM_CPUS_PER_TASK"] == "3"
        assert (env["UCX_TLS"], env["FI_PROVIDER"]) == ("tcp,self", "the user's")
        assert (env["NCCL_SOCKET_IFNAME"], env["NCCL_DEBUG"]) == ("lo", "INFO")
        assert (env["HF_HUB_OFFLINE"], env["HDF5_USE_FILE_LOCKING"], env["PYTHONNOUSERSITE"]) == ("1", "FALSE", "1")
        mine = str(local).replace("$SLURM_JOB_USER", env["SLURM_JOB_USER"]) + f"/hpcinfer-{job}"
        assert env["TMPDIR"] == f"{mine}/tmp" and env["TRITON_CACHE_DIR"] == f"{mine}/triton"
        assert rank["argv"][1:4] == ["-m", "hpcinfer", "run"]
        assert abs(float(env["SLURM_JOB_END_TIME"]) - time.time() - 300) < 60
        assert rank["files"][0] == rank["files"][1] > 1100  # raised from what the login shell had
        assert rank["python"] == f"{mine}/environment/bin/python3"
    # Where nodes have disks of their own this host has seen nothing of it, and nothing is left on the nodes.
    assert not (cluster.namespaces and list(cluster.local.iterdir()))
    left = cluster.run("srun", "--nodes=2", "--ntasks=2", "find", str(cluster.local), "-name", f"hpcinfer-{job}").stdout
    assert not left
