"""Starts that join a run, are drained, are killed: the others go on as if nothing had happened."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from hpcinfer.config.job import RunSection
from hpcinfer.data.generations import GenerationFile
from hpcinfer.data.ledger.run_directory import open_existing
from hpcinfer.data.ledger.status import read_status
from hpcinfer.data.ledger.writers import read_heartbeat
from tests.runs import assert_same, read_outputs, run_demo
from tests.slow_runs import SLOW, Start, write_job

NUM_ROWS = 150


class Pulse:
    """Watches a writer's heartbeat: the longest time in which its counter stood still while it was running."""

    def __init__(self, output: Path, writer_id: str) -> None:
        self._run, self._id = open_existing(output), writer_id
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.longest_s = 0.0
        self.num_beats = 0

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        counter, since = None, time.monotonic()
        while not self._stop.wait(0.05):
            beat, now = read_heartbeat(self._run, self._id), time.monotonic()
            if beat.get("state") in ("running", "idle"):
                self.longest_s = max(self.longest_s, now - since)
            if beat.get("counter") != counter:
                counter, since = beat.get("counter"), now
                self.num_beats += 1


def num_committed(output: Path, writer_id: str) -> int:
    """Rows in the segments of a writer."""
    rows = set()
    for path in (output / "segments").glob(f"seg-{writer_id}-*.h5"):
        with GenerationFile(path) as file:
            rows |= {generation.row for generation in file}
    return len(rows)


@pytest.mark.timeout(300)
def test_one_is_drained_one_is_killed_one_joins_and_one_goes_on(tmp_path):
    job = write_job(tmp_path, NUM_ROWS, max_tokens=lambda row: 25 + row % 20)
    output, settings = tmp_path / "run", [*job, "parallel.tp=1", *SLOW, "run.drain_s=60", "run.linger_s=60"]
    with Start(output, 1, settings) as stays, Start(output, 1, settings) as drained, Start(output, 1, settings) as killed:
        stays.wait_for(lambda status: sum(writer.num_ok > 0 for writer in status.writers) == 3)
        ids = {writer.identity.pid: writer.id for writer in read_status(output).writers}
        with Pulse(output, ids[stays.process.pid]) as pulse:
            drained.signal(0)
            killed.process.kill()
            with Start(output, 1, settings) as joins:
                assert drained.wait() == 3, drained.text
                assert stays.wait() == 0, stays.text
                assert joins.wait() == 0, joins.text
    status = read_status(output)
    by_pid = {writer.identity.pid: writer for writer in status.writers}
    assert len(by_pid) == 4 and status.complete
    assert by_pid[drained.process.pid].reason == "drained" and by_pid[killed.process.pid].state == "running"
    assert by_pid[joins.process.pid].num_ok > 0, "it joined and found nothing to do"
    begun = {start: start.summary["counters"]["begun"] for start in (stays, drained, joins)}
    assert begun[drained] == by_pid[drained.process.pid].num_ok, "the drained one began a row in vain"
    # What the killed one had committed is not begun again, what it had in work is.
    assert sum(begun.values()) == NUM_ROWS - num_committed(output, by_pid[killed.process.pid].id)
    assert pulse.num_beats > 10
    assert pulse.longest_s < RunSection().heartbeat_s, f"its work stood still for {pulse.longest_s:.1f} s"
    run_demo(tmp_path / "undisturbed", [*job, "parallel.tp=1"])
    assert_same(read_outputs(output), read_outputs(tmp_path / "undisturbed"))
