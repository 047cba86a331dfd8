"""The test cluster itself: it is what it claims to be, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.mpi import alive, descendants
from tests.slurm import cluster as slurm_cluster
from tests.slurm.jobs import wait_for

FACTS = 'echo $(hostname) $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES $(stat -c %d /dev/shm); touch "$LOCAL/$SLURM_PROCID"'


@pytest.mark.parametrize(
    "namespaces",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(not slurm_cluster.can_have_namespaces(), reason="needs root, and unshare, nsenter, ip (iproute2)"),
        ),
    ],
    ids=["plain", "namespaces"],
)
def test_nodes_states_and_records(namespaces, tmp_path):
    with slurm_cluster.start(2, namespaces=namespaces, gpus=2) as cluster:
        script = f"#!/bin/bash\nexport LOCAL='{cluster.local}'\nsrun --gpus-per-node=2 bash -c '{FACTS}'\n"
        options = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", f"--output={tmp_path}/log"]
        job = cluster.sbatch(script, *options)
        assert cluster.wait(job)["JobState"] == "COMPLETED"
        lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
        assert sorted(line[1] for line in lines) == ["n1", "n1", "n2", "n2"]
        assert {line[2] for line in lines} == {"0,1"}
        # Names, shared memory and local disk differ between nodes only with namespaces.
        assert {line[0] for line in lines} == ({"n1", "n2"} if namespaces else {os.uname().nodename})
        assert len({line[3] for line in lines}) == (2 if namespaces else 1)
        assert len(list(cluster.local.iterdir())) == (0 if namespaces else 4)

        sleeper = cluster.sbatch("#!/bin/bash\nsrun sleep 100\n", "--no-requeue", "--output=/dev/null")
        node = cluster.wait(sleeper, "RUNNING")["BatchHost"]
        cluster.set_node(node, "down")
        assert cluster.wait(sleeper)["JobState"] == "NODE_FAIL"
        assert cluster.node_states()[node].startswith("down")
        cluster.set_node(node, "resume")
        wait_for(lambda: cluster.node_states()[node].startswith("idle"))
        assert [record["JobState"] for record in cluster.records()] == ["COMPLETED", "NODE_FAIL"]
        folder, keeper = cluster.folder, cluster.keeper_pid
        daemons = descendants(keeper)
        assert folder.is_dir() and len(daemons) >= 3
    assert not folder.exists()
    assert not any(alive(pid) for pid in [keeper, *daemons])


def test_nothing_is_left_when_its_owner_is_killed():
    """With a job that runs: its processes are children of nobody by then."""
    reading, writing = os.pipe()
    owner = os.fork()
    if owner == 0:
        cluster = slurm_cluster.start(1)
        cluster.wait(cluster.sbatch("#!/bin/bash\nsrun sleep 1000\n", "--output=/dev/null"), "RUNNING")
        os.write(writing, f"{cluster.keeper_pid} {cluster.folder}".encode())
        signal.pause()
        os._exit(0)
    try:
        keeper, folder = os.read(reading, 1000).decode().split()
        wait_for(lambda: any("sleep" in _command(pid) for pid in descendants(int(keeper))))
        processes = [int(keeper), *descendants(int(keeper))]
    finally:
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
        os.close(reading)
        os.close(writing)
    wait_for(lambda: not any(alive(pid) for pid in processes), within_s=20)
    wait_for(lambda: not Path(folder).exists(), within_s=20)


def test_without_slurm_the_reason_comes_with_the_command(monkeypatch):
    assert slurm_cluster.missing() == ""
    monkeypatch.setattr(slurm_cluster, "_PATH", "/nonexistent")
    assert slurm_cluster.missing() == f"no slurmctld, slurmd, sbatch, srun here: {slurm_cluster.INSTALL}"


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
