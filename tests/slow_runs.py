"""Starts of runs whose ranks are slow (`tests.faults.slow_rank`), so that there is time to disturb them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hpcinfer.data.ledger.status import RunStatus, read_status
from hpcinfer.data.prompts.prompts_writer import PromptsWriter
from hpcinfer.errors import RunDirectoryError
from tests.conftest import ROOT
from tests.mpi import kill_tree, rank_env, ranks_below, world_command, world_env
from tests.runs import JOB
from tests.waiting import until

SLOW = ["run.segment_s=0.1", "run.heartbeat_s=0.2", "engine.max_sequences=6"]
STEP_S = "0.02"


def write_job(folder: Path, num_rows: int, *, max_tokens: Callable[[int], int]) -> list[str]:
    """Settings of a sampled job of `num_rows` rows, each of exactly `max_tokens(row)` tokens."""
    path = folder / "prompts.h5"
    with PromptsWriter(path, kind="text") as writer:
        for row in range(num_rows):
            writer.append(f"{row}+{row}=", overrides={"max_tokens": max_tokens(row)})
    return [f"data.prompts={path}", "sampling.ignore_eos=true", "sampling.temperature=1.0", "sampling.seed=3"]


class Start:
    """A start of slow ranks under mpiexec (or, of one rank, alone), in a session of its own."""

    def __init__(self, output: Path, num_ranks: int, settings: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self.output, self.num_ranks = output, num_ranks
        number = len(list(output.parent.glob("*.log")))
        self.log, self._summary = output.parent / f"{number}.log", output.parent / f"{number}.json"
        argv = ["-m", "tests.faults.slow_rank", STEP_S, "run", JOB, "--summary", str(self._summary)]
        argv += [word for setting in [f"data.output={output}", *settings] for word in ("--set", setting)]
        command = [sys.executable, *argv] if num_ranks == 1 else world_command(num_ranks, argv)
        environment = rank_env(env) if num_ranks == 1 else world_env(num_ranks, env, command[0])
        with open(self.log, "wb") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )

    def __enter__(self) -> Start:
        return self

    def __exit__(self, *_: object) -> None:
        kill_tree(self.process.pid)
        self.process.wait()

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def summary(self) -> dict:
        return json.loads(self._summary.read_text())

    def wait_for(self, condition: Callable[[RunStatus], bool]) -> None:
        """Until a condition on the run's status holds."""
        def holds() -> bool:
            assert self.process.poll() is None, f"ended too early\n{self.text}"
            try:
                return condition(read_status(self.output, exact=True))
            except RunDirectoryError:
                return False

        until(holds, within_s=100)

    def signal(self, rank: int, number: int = signal.SIGUSR1) -> None:
        os.kill(ranks_below(self.process.pid)[rank] if self.num_ranks > 1 else self.process.pid, number)

    def wait(self) -> int:
        return self.process.wait(timeout=100)


def has_committed(rows: int):
    return lambda status: status.num_done >= rows


def cut_rows_short(output: Path, settings: Sequence[str], *, after: int) -> None:
    """A start of two slow ranks, told to drain after so many rows, which leaves partial rows behind."""
    with Start(output, 2, [*settings, *SLOW, "run.drain_s=0.1"]) as start:
        start.wait_for(has_committed(after))
        start.signal(1)
        assert start.wait() == 3, start.text
    assert read_status(output, exact=True).num_partial > 0
