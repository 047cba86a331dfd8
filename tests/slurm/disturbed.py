"""Arrays of real jobs with slow ranks that are disturbed while they run: the faults, and a watch over everybody's heartbeat."""

from __future__ import annotations

import dataclasses
import datetime
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hpcinfer.data.ledger.run_directory import RunDirectory, open_existing
from hpcinfer.data.ledger.status import read_status
from hpcinfer.data.ledger.writers import WriterIdentity, read_heartbeat, read_identity, writer_ids
from hpcinfer.errors import RunDirectoryError
from tests.mpi import descendants
from tests.slurm.cluster import ENDED, Cluster
from tests.slurm.jobs import logs, submit_demo, wait_for

TASKS = 3
LOST_AFTER_S = 8
"""SlurmdTimeout of the cluster for such runs: Slurm gives a node that does not answer up after so long, and requeues its jobs."""
SETTINGS = [
    "engine.max_sequences=6", "run.segment_s=0.3", "run.heartbeat_s=0.2", "run.stale_s=8", "run.linger_s=60",
    "comm.deadline_s=6", "comm.heartbeat_s=1",
]  # fmt: skip
_WORKING = ("running", "idle", "draining", "merging")


# The run ------------------------------------------------------------------------------------------------------------


class DisturbedRun:
    """An array of the demo job with slow ranks, one replica in each task.

    Args:
        folder: to submit from; `fixture workplace`.
        settings: of the job.
        tp: ranks of a replica, each on a node of its own.
        step_s: what every step takes in addition.
        options: more arguments of `hpcinfer submit`.
    """

    def __init__(
        self, cluster: Cluster, folder: Path, settings: Sequence[str], *, tp: int = 1, step_s: float = 0.05, tasks: int = TASKS,
        limit: str = "10", slurm: dict | None = None,
    ) -> None:
        self.cluster, self.folder, self.output = cluster, folder, folder / "run"
        python = slow_python(folder, step_s)
        site = {
            "slurm": {"ranks_per_node": 1, "options": ["--exclusive"], **(slurm or {})},
            "environment": {"python": str(python), "variables": {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "eth0"}},
        }
        shape = ["--array", tasks, "--nodes", tasks * tp] if tasks > 1 else ["--nodes", tp]
        [self.job] = submit_demo(
            cluster, folder, *shape, "--time", limit, site=site, settings=[*settings, *SETTINGS, f"parallel.tp={tp}"]
        )["jobs"]

    def tasks(self) -> dict[str, dict[str, str]]:
        """Number in the array -> record of the task."""
        return {task.get("ArrayTaskId", ""): task for task in self.cluster.tasks(self.job)}

    def wait_for_start(self) -> None:
        wait_for(lambda: all(task["JobState"] == "RUNNING" for task in self.tasks().values()))

    def wait_for_rows(self) -> None:
        """Until every task has committed some."""
        def committed() -> int:
            try:
                return len({writer.identity.job for writer in read_status(self.output).writers if writer.num_ok})
            except RunDirectoryError:
                return 0

        wait_for(lambda: committed() == len(self.tasks()), within_s=100)

    def rows_done(self) -> int:
        try:
            return read_status(self.output, exact=True).num_done
        except RunDirectoryError:
            return 0

    @property
    def is_complete(self) -> bool:
        return (self.output / "done.json").exists()

    def wait(self, within_s: float = 200) -> None:
        """Until all tasks have ended."""
        self.cluster.wait(self.job, *ENDED, within_s=within_s)

    def identities(self, job: str) -> list[WriterIdentity]:
        """The lives of a task in the run, the first one first."""
        run = open_existing(self.output)
        found = [identity for each in writer_ids(run) if (identity := read_identity(run, each)) is not None]
        return sorted((identity for identity in found if identity.job == job), key=lambda identity: identity.restart_count)

    def say(self) -> str:
        """All that there is to see, for a failed test."""
        parts = [str(self.tasks()), logs(self.folder)]
        parts += [f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(self.output.glob("logs/*"))]
        return "\n".join(parts)

    def processes(self, job: str) -> dict[str, dict[int, list[int]]]:
        """Processes of the step of a task that has the ranks: "launcher" -> {0: srun's}, "rank" -> {rank: its own}."""
        found: dict[str, dict[int, list[int]]] = {"launcher": {}, "rank": {}}
        for pid in descendants(self.cluster.keeper_pid):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                variables = dict(line.partition(b"=")[::2] for line in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
            except OSError:
                continue
            if variables.get(b"SLURM_JOB_ID") != job.encode() or b"jobs/demo.toml" not in words:
                continue
            if os.path.basename(words[0]) == b"srun":
                found["launcher"].setdefault(0, []).append(pid)
            else:
                found["rank"].setdefault(int(variables[b"SLURM_PROCID"]), []).append(pid)
        return found


def slow_python(folder: Path, step_s: float) -> Path:
    """An interpreter for a site: its `-m hpcinfer run` has slow steps, and writes the summary of each life into `folder`."""
    path = folder / "slow python"
    summary = f"{folder}/summary-$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}.json"
    path.write_text(
        f'#!/bin/bash\nexec "{sys.executable}" -m tests.faults.slow_rank {step_s} "${{@:3}}" --summary "{summary}"\n'
    )
    path.chmod(0o755)
    return path


# The watch ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class Pulse:
    """What was seen of a writer."""

    job: str
    key: object = None
    since: float = 0.0
    state: str = ""
    num_beats: int = 0
    longest_s: dict[str, float] = dataclasses.field(default_factory=lambda: {"before": 0.0, "after": 0.0})
    """The longest time in which its counter of finished steps stood still while it was at work, before the fault and after it."""
    idle_s: float = 0.0
    """How long it had nothing to do, because the others had all rows that were left."""


class Watch:
    """Looks at the heartbeats of all writers of a run, ten times a second, from its first moment on."""

    PERIOD_S = 0.1

    def __init__(self, output: Path) -> None:
        self._output = output
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)
        self._phase = "before"
        self.pulses: dict[str, Pulse] = {}

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def fault(self) -> None:
        """From here on what stands still counts as after the fault."""
        self._phase = "after"

    def of(self, jobs: set[str]) -> list[Pulse]:
        """The writers of these Slurm jobs."""
        return [pulse for pulse in self.pulses.values() if pulse.job in jobs]

    def _look_on(self) -> None:
        run: RunDirectory | None = None
        looked_at = time.monotonic()
        while not self._stop.wait(self.PERIOD_S):
            now = time.monotonic()
            try:
                run = run or open_existing(self._output)
                for writer_id in writer_ids(run):
                    self._look(run, writer_id, now, now - looked_at)
            except (RunDirectoryError, OSError):
                pass  # it is just being made
            looked_at = now

    def _look(self, run: RunDirectory, writer_id: str, now: float, passed_s: float) -> None:
        pulse = self.pulses.get(writer_id)
        if pulse is None:
            identity = read_identity(run, writer_id)
            if identity is None:
                return
            pulse = self.pulses[writer_id] = Pulse(identity.job, since=now)
        beat = read_heartbeat(run, writer_id)
        state = beat.get("state", "")
        if state in _WORKING and pulse.state in _WORKING:
            pulse.longest_s[self._phase] = max(pulse.longest_s[self._phase], now - pulse.since)
            pulse.idle_s += passed_s if state == "idle" else 0.0
        if (key := (beat.get("counter"), state)) != pulse.key:
            pulse.key, pulse.since, pulse.state = key, now, state
            pulse.num_beats += 1


# Faults -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Victim:
    """A task that is disturbed."""

    run: DisturbedRun
    reference: str
    """As Slurm's commands know it."""
    job: str
    """Its own job id."""
    nodes: tuple[str, ...]
    """The batch host first."""
    number: int
    """Of the round: where a fault has two forms, rounds take turns."""
    rng: random.Random

    @property
    def cluster(self) -> Cluster:
        return self.run.cluster

    @property
    def task(self) -> dict[str, str]:
        """Its record now."""
        return next(task for task in self.cluster.tasks(self.run.job) if task["JobId"] == self.job)

    def processes(self, part: str) -> dict[int, list[int]]:
        """Wait for the processes of a part of the step, "launcher" or "rank"."""
        found: dict[int, list[int]] = {}

        def there() -> bool:
            found.update(self.run.processes(self.job)[part])
            return bool(found)

        wait_for(there)
        return found


Fault = Callable[[Victim], Iterator[str]]
"""Generators: they act, yield what they did, and mend what they broke when they are resumed, which is at once."""


def kill_rank(victim: Victim) -> Iterator[str]:
    ranks = victim.processes("rank")
    rank = victim.rng.choice(sorted(ranks))
    _kill(ranks[rank])
    yield f"SIGKILL of rank {rank}"


def kill_launcher(victim: Victim) -> Iterator[str]:
    """srun is two processes; the second one looks after the first."""
    found = victim.processes("launcher")[0]
    pids = found if victim.number // 2 % 2 else [min(found)]
    _kill(pids)
    yield f"SIGKILL of srun ({len(pids)} of its {len(found)} processes)"


def lose_batch_host(victim: Victim) -> Iterator[str]:
    yield from _lose(victim, victim.nodes[0], "the batch host")


def lose_other_node(victim: Victim) -> Iterator[str]:
    yield from _lose(victim, victim.nodes[-1], "the second node")


def cancel(victim: Victim) -> Iterator[str]:
    victim.cluster.run("scancel", victim.reference)
    yield "scancel"


def requeue(victim: Victim) -> Iterator[str]:
    victim.cluster.run("scontrol", "requeue", victim.reference)
    yield "scontrol requeue"


def end_time(victim: Victim) -> Iterator[str]:
    """The ranks believe in the limit that was there when they began: for them SIGTERM comes without a warning.

    Slurm looks at limits every 30 s, from whenever it was started: that makes the moment a random one.
    """
    def is_over() -> bool:
        task = victim.task
        if task["JobState"] in ("COMPLETING", "TIMEOUT") or task["Restarts"] != "0":
            return True
        if datetime.datetime.fromisoformat(task["EndTime"]) > datetime.datetime.now() + datetime.timedelta(minutes=1):
            # Slurm forgets it where the job is just beginning.
            victim.cluster.run("scontrol", "update", f"jobid={victim.reference}", "EndTime=now+1")
        return False

    wait_for(is_over, within_s=45)
    yield "time limit, without a warning before it"
    wait_for(lambda: victim.task["JobState"] == "PENDING", within_s=45)
    victim.cluster.run("scontrol", "update", f"jobid={victim.reference}", "timelimit=10")  # the next life would have less than a minute


def cut_off(victim: Victim) -> Iterator[str]:
    """Of a node's network. Heals before Slurm gives the node up, or after that (then the job has been requeued)."""
    node = victim.rng.choice(victim.nodes)
    least_s, most_s = (2 * LOST_AFTER_S, 3 * LOST_AFTER_S) if victim.number // 2 % 2 else (2, LOST_AFTER_S - 2)
    for_s = victim.rng.uniform(least_s, most_s)
    victim.cluster.set_link(node, up=False)
    began = time.monotonic()
    which = "the batch host" if node == victim.nodes[0] else "the second node"
    yield f"network of {which} cut for {for_s:.1f} s"
    time.sleep(max(0.0, began + for_s - time.monotonic()))
    victim.cluster.set_link(node, up=True)


FAULTS: dict[str, Fault] = {
    "rank killed": kill_rank,
    "launcher killed": kill_launcher,
    "batch host down": lose_batch_host,
    "other node down": lose_other_node,
    "cancelled": cancel,
    "time limit": end_time,
    "requeued": requeue,
    "network cut": cut_off,
}


def _lose(victim: Victim, node: str, which: str) -> Iterator[str]:
    """For the whole round: a node that comes back with processes of a job that has been requeued is set aside by Slurm."""
    victim.cluster.set_node(node, "down")
    yield f"{which} set down"


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
