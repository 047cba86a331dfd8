"""A real Slurm cluster of several nodes on this host, for tests.

    with start(3) as cluster:
        job = cluster.sbatch("#!/bin/bash\\nsrun hostname\\n", "--nodes=3")
        record = cluster.wait(job)

Two forms. The plain one needs no root: all nodes share the host's name, network and /dev/shm. With `namespaces=True` (root) each node
has its own hostname, address, boot id, /dev/shm and node-local folder, behind a bridge that is cut off from the host's network.
Nothing is left when it ends, whatever happens (`keeper.py`).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.mpi import ROOT, rank_env
from tests.slurm.keeper import CONTROLLER_ADDRESS, link_name, node_address

INSTALL = "apt-get install -y --no-install-recommends slurm-wlm iproute2"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "PREEMPTED")
GPU_FILES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random")
"""Character devices that stand in for GPUs: Slurm only looks whether they are there."""
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def missing() -> str:
    """Why there can be no cluster here, with the command that mends it; "" when there can."""
    absent = [name for name in ("slurmctld", "slurmd", "sbatch", "srun") if shutil.which(name, path=_PATH) is None]
    return f"no {', '.join(absent)} here: {INSTALL}" if absent else ""


def can_have_namespaces() -> bool:
    """True for root with the tools for it."""
    return os.geteuid() == 0 and all(shutil.which(name, path=_PATH) for name in ("ip", "unshare", "nsenter"))


def start(
    num_nodes: int, *, namespaces: bool = False, gpus: int = 0, cpus: int = 8, kill_wait_s: int = 3, lost_after_s: int = 20
) -> Cluster:
    """Start a cluster and wait until its nodes are idle.

    Args:
        namespaces: nodes with their own hostname, network and /dev/shm; needs root.
        gpus: fake GPUs a node, at most 4.
        cpus: CPUs that each node claims to have.
        kill_wait_s: time between SIGTERM and SIGKILL at the end of a job.
        lost_after_s: a node that does not answer for so long is down, and its jobs fail or are requeued (SlurmdTimeout).
    """
    folder = Path(tempfile.mkdtemp(prefix="hpcinfer-slurm-"))
    names = [f"n{number}" for number in range(1, num_nodes + 1)]
    for name in names:
        for part in ("spool", "local"):
            (folder / part / name).mkdir(parents=True)
    (folder / "local" / "all").mkdir()
    (folder / "state").mkdir()
    ports = [6817, *[6818] * num_nodes] if namespaces else _free_ports(num_nodes + 1)
    (folder / "slurm.conf").write_text(
        _slurm_conf(
            folder, names, ports, namespaces=namespaces, gpus=gpus, cpus=cpus, kill_wait_s=kill_wait_s, lost_after_s=lost_after_s
        )
    )
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    if gpus:
        (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={','.join(GPU_FILES[:gpus])}\n")
    cluster = Cluster(folder, names, namespaces=namespaces)
    try:
        cluster.start()
    except BaseException:
        cluster.stop()
        raise
    return cluster


class Cluster:
    """A running cluster. Use `start` to make one."""

    def __init__(self, folder: Path, nodes: Sequence[str], *, namespaces: bool) -> None:
        self.folder = folder
        self.nodes = tuple(nodes)
        self.namespaces = namespaces
        self.local = folder / "local" / "all"
        """With namespaces: a folder with other content on each node (and empty on the host)."""
        self.user = _user_name()
        self._keeper: subprocess.Popen | None = None
        self._started_s = 0.0

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def env(self) -> dict[str, str]:
        """Environment of Slurm's commands, and so of jobs: that of ranks in tests, where the cluster is, and a TMPDIR of its own (two
        clusters on one host have jobs of the same numbers)."""
        return rank_env({"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _PATH, "TMPDIR": str(self.local)})

    @property
    def keeper_pid(self) -> int:
        """Process id of the daemons' parent."""
        return self._keeper.pid

    def start(self) -> None:
        """Start the daemons and wait until all nodes are idle."""
        controller = ["slurmctld", "-D", "-i", "-f", str(self.folder / "slurm.conf")]
        plan = {
            "folder": str(self.folder), "namespaces": self.namespaces, "log": str(self.folder / "daemons.log"), "controller": controller,
            "nodes": [
                {
                    "name": name, "local": str(self.local),
                    "command": ["slurmd", "-D", "-N", name, "-f", str(self.folder / "slurm.conf")],
                }
                for name in self.nodes
            ],
        }  # fmt: skip
        (self.folder / "plan.json").write_text(json.dumps(plan))
        command = [sys.executable, "-m", "tests.slurm.keeper", str(self.folder / "plan.json")]
        if self.namespaces:
            command = ["unshare", "--net", *command]
        with open(self.folder / "daemons.log", "ab") as log:
            self._keeper = subprocess.Popen(
                command, cwd=ROOT, env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                start_new_session=True,
            )
        self._started_s = time.time()
        assert self._keeper.stdout.readline() == "started\n", self._report("the daemons did not start")
        self._until(lambda: set(self.node_states().values()) == {"idle"}, "the nodes are not idle", within_s=60)

    def stop(self) -> None:
        """End all jobs and daemons; the keeper removes the folder."""
        if self._keeper is not None:
            self._keeper.stdin.close()
            try:
                self._keeper.wait(timeout=30)
            finally:
                self._keeper.stdout.close()
                self._keeper = None

    def command(self, argv: Sequence[str]) -> list[str]:
        """`argv` as it has to be run on this host to see the cluster's network."""
        if not self.namespaces:
            return list(argv)
        return ["nsenter", f"--net=/proc/{self._keeper.pid}/ns/net", *argv]

    def run(
        self, *argv: str, stdin: str = "", cwd: Path = ROOT, env: Mapping[str, str] | None = None, timeout_s: float = 60,
        check: bool = True,
    ) -> subprocess.CompletedProcess:
        """Run a command as on a login node. Fails the test unless it ends with 0, or `check` is False."""
        result = subprocess.run(
            self.command([str(word) for word in argv]), input=stdin, cwd=cwd, env={**self.env, **(env or {})},
            capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False,
        )  # fmt: skip
        assert not check or result.returncode == 0, f"{argv} ended with {result.returncode}\n{result.stdout}{result.stderr}"
        return result

    def sbatch(self, script: str, *options: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> int:
        """Submit a script and return the job's id."""
        return int(self.run("sbatch", "--parsable", *options, stdin=script, cwd=cwd, env=env).stdout.split(";")[0])

    def job(self, job_id: int) -> dict[str, str]:
        """The record of a job, as `scontrol show job` names its fields."""
        return self.tasks(job_id)[0]

    def tasks(self, job_id: int) -> list[dict[str, str]]:
        """The records of an array's tasks, those that have not begun together in one."""
        text = self.run("scontrol", "--oneliner", "show", "job", str(job_id)).stdout
        records = re.split(r"^(?=JobId=)", text, flags=re.MULTILINE)[1:]  # folders may have line breaks in their names
        return [dict(re.findall(r"([\w/:]+)=(.*?)(?= [A-Z][A-Za-z/:]*=|\s*\Z)", each, re.DOTALL)) for each in records]

    def wait(self, job_id: int, *states: str, within_s: float = 200) -> dict[str, str]:
        """Wait until a job, or all tasks of an array, are in one of `states` (by default: any in which it has ended)."""
        wanted = states or ENDED
        self._until(
            lambda: all(task["JobState"] in wanted for task in self.tasks(job_id)), f"job {job_id} is not {wanted}", within_s
        )
        return self.job(job_id)

    def records(self) -> list[dict[str, str]]:
        """One record for every end of a job's life, requeues included, in the order of their ends."""
        path = self.folder / "jobcomp"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return [dict(re.findall(r"(\w+)=(.*?)(?= \w+=|\s*$)", line)) for line in lines]

    def node_states(self) -> dict[str, str]:
        """Node -> its state in Slurm's words (idle, allocated, mixed, down, ...)."""
        result = self.run("sinfo", "--noheader", "--Node", "--format=%N %T", check=False)
        return dict(line.split() for line in result.stdout.splitlines()) if result.returncode == 0 else {}

    def set_node(self, node: str, state: str) -> None:
        """Set a node down (its jobs fail at once, or are requeued), or let it resume."""
        self.run("scontrol", "update", f"nodename={node}", f"state={state}", "reason=test")

    def set_link(self, node: str, *, up: bool) -> None:
        """Cut a node off the network, or bring it back. Needs namespaces."""
        self.run("ip", "link", "set", link_name(node), "up" if up else "down")

    def next_limit_check_s(self) -> float:
        """Seconds until the controller looks at time limits, which it does every 30 s: warnings and limits come only then."""
        lines = [line for line in (self.folder / "slurmctld.log").read_text(errors="replace").splitlines() if "job time limit" in line]
        last = datetime.datetime.fromisoformat(lines[-1][1:24]).timestamp() if lines else self._started_s
        return last + 30 - time.time()

    def slurmd_pid(self, node: str) -> int:
        """Process id of a node's daemon."""
        return int((self.folder / f"{node}.pid").read_text())

    def _until(self, condition: Callable[[], bool], problem: str, within_s: float) -> None:
        end = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < end, self._report(f"{problem} after {within_s} s")
            time.sleep(0.2)

    def _report(self, problem: str) -> str:
        """`problem`, with what there is to see."""
        parts = [problem]
        for path in (self.folder / "daemons.log", *sorted(self.folder.glob("*.log"))):
            if path.exists():
                parts.append(f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}")
        if self._keeper is not None and self._keeper.poll() is None:
            for command in (["sinfo"], ["squeue"]):
                parts.append(self.run(*command, check=False).stdout)
        return "\n".join(parts)


def _slurm_conf(
    folder: Path, names: Sequence[str], ports: Sequence[int], *, namespaces: bool, gpus: int, cpus: int, kill_wait_s: int,
    lost_after_s: int,
) -> str:
    host, user = socket.gethostname().split(".")[0], _user_name()
    lines = [
        "ClusterName=hpcinfertest",
        f"SlurmctldHost={host}({CONTROLLER_ADDRESS if namespaces else '127.0.0.1'})",
        f"SlurmctldPort={ports[0]}",
        f"SlurmUser={user}",
        f"SlurmdUser={user}",
        # No munge on this host. A requeued job waits for the expiry before it begins again; less than 5 s counts as 120.
        "AuthType=auth/none", "CredType=cred/none", "AuthInfo=cred_expire=5",
        "MpiDefault=pmi2", "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "MailProg=/bin/true",
        # Nodes have more CPUs than this host.
        "SlurmdParameters=config_overrides", "SelectType=select/cons_tres", "SelectTypeParameters=CR_Core",
        "ReturnToService=1", "MinJobAge=3600", f"KillWait={kill_wait_s}", f"SlurmdTimeout={lost_after_s}",
        "SlurmctldDebug=debug2",  # says when it looks at time limits
        "SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0",
        "JobCompType=jobcomp/filetxt", f"JobCompLoc={folder}/jobcomp",
        f"StateSaveLocation={folder}/state", f"SlurmdSpoolDir={folder}/spool/%n", f"TmpFS={folder}/local/%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid", f"SlurmdPidFile={folder}/%n.pid",
        f"SlurmctldLogFile={folder}/slurmctld.log", f"SlurmdLogFile={folder}/%n.log",
        *(["GresTypes=gpu"] if gpus else []),
    ]  # fmt: skip
    for index, (name, port) in enumerate(zip(names, ports[1:], strict=True)):
        address = node_address(index) if namespaces else "127.0.0.1"
        resources = f"CPUs={cpus} RealMemory=8000" + (f" Gres=gpu:{gpus}" if gpus else "")
        lines.append(f"NodeName={name} NodeHostname={name if namespaces else host} NodeAddr={address} Port={port} {resources}")
    lines.append(f"PartitionName=main Nodes={','.join(names)} Default=YES MaxTime=60 DefaultTime=10 State=UP")
    return "\n".join(lines) + "\n"


def _user_name() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name


def _free_ports(number: int) -> list[int]:
    """Ports that nobody uses now. They are held together, so that no two are the same."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [each.getsockname()[1] for each in held]
