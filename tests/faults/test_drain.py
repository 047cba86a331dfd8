"""Drains of whole runs: by a signal to any rank, by a second one, by the end of the job; and what the next life has to do."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from hpcinfer.data.ledger.run_directory import open_existing
from hpcinfer.data.ledger.status import RunStatus, read_status
from hpcinfer.data.ledger.writers import WriterIdentity, register_writer
from tests.conftest import ROOT
from tests.mpi import rank_env
from tests.runs import JOB, LAYOUTS, assert_same, read_outputs, run_demo
from tests.slow_runs import SLOW, Start, cut_rows_short, has_committed, write_job

NUM_ROWS = 60


def length(row: int) -> int:
    """Tokens of a row: some end while others have just begun."""
    return 25 + row % 20


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> list[str]:
    return write_job(tmp_path_factory.mktemp("prompts"), NUM_ROWS, max_tokens=length)


@pytest.fixture(scope="module")
def undisturbed(job, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    run_demo(output, [*job, "parallel.tp=1"])
    return read_outputs(output)


def is_draining(status: RunStatus) -> bool:
    return any(writer.state == "draining" for writer in status.writers)


def finish(output: Path, job: Sequence[str]) -> dict:
    """Run to the end on one rank; return the summary."""
    summary = output.parent / "last.json"
    command = [sys.executable, "-m", "hpcinfer", "run", JOB, "--quiet", "--summary", str(summary)]
    command += [word for setting in [f"data.output={output}", *job, "parallel.tp=1"] for word in ("--set", setting)]
    subprocess.run(command, cwd=ROOT, env=rank_env(), stdin=subprocess.DEVNULL, timeout=100, check=True)
    return json.loads(summary.read_text())


@pytest.mark.timeout(240)
@pytest.mark.parametrize("layout", ["tp2", pytest.param("pp2", marks=pytest.mark.full)])
def test_a_signal_to_one_rank_that_does_not_lead_drains_and_nothing_is_computed_twice(layout, tmp_path, job, undisturbed):
    output = tmp_path / "run"
    with Start(output, 2, [*job, *LAYOUTS[layout], *SLOW, "run.drain_s=60"]) as start:
        start.wait_for(has_committed(8))
        start.signal(1)
        assert start.wait() == 3, start.text
        first = start.summary
    assert "SIGUSR1 to rank 1: no row is begun any more" in start.text
    status = read_status(output, exact=True)
    assert 8 <= status.num_done < NUM_ROWS and status.num_partial == 0
    assert first["counters"]["begun"] == status.num_done, "a row was begun in vain"
    last = finish(output, job)
    assert last["counters"]["begun"] == NUM_ROWS - status.num_done == last["generated_rows"]
    assert_same(read_outputs(output), undisturbed)


@pytest.mark.full
@pytest.mark.timeout(240)
@pytest.mark.parametrize("layout", ["pp2", "tp2", "sp2"])
def test_with_little_time_rows_are_kept_as_partial_rows(layout, tmp_path, job, undisturbed):
    output = tmp_path / "run"
    cut_rows_short(output, [*job, *LAYOUTS[layout]], after=8)
    status = read_status(output, exact=True)
    assert status.num_partial <= 6
    last = finish(output, job)
    assert last["counters"]["begun"] == NUM_ROWS - status.num_done
    assert_same(read_outputs(output), undisturbed)


@pytest.mark.full
@pytest.mark.timeout(240)
def test_a_second_signal_ends_the_waiting(tmp_path):
    """Rows of 400 steps: none would be ready in the second between the two signals."""
    output = tmp_path / "run"
    job = write_job(tmp_path, 12, max_tokens=lambda row: 3 if row % 3 == 0 else 400)
    with Start(output, 2, [*job, *LAYOUTS["pp2"], *SLOW, "run.drain_s=600"]) as start:
        start.wait_for(has_committed(1))
        start.signal(1)
        start.wait_for(is_draining)
        time.sleep(1.1)
        assert start.process.poll() is None
        start.signal(1)
        assert start.wait() == 3, start.text
    status = read_status(output, exact=True)
    assert status.num_partial > 0 and status.writers[0].reason == "drained"
    assert "cut short and kept as partial rows" in start.text
    last = finish(output, job)
    assert last["counters"]["begun"] == 12 - status.num_done
    assert last["output_tokens"] < 400 * last["generated_rows"], "what was generated before is generated again"


@pytest.mark.timeout(240)
def test_one_replica_of_two_drains_and_the_other_takes_its_rows(tmp_path, job, undisturbed):
    output = tmp_path / "run"
    with Start(output, 2, [*job, *LAYOUTS["dp2"], *SLOW, "run.drain_s=60"]) as start:
        start.wait_for(lambda status: len(status.writers) == 2 and all(writer.num_ok for writer in status.writers))
        start.signal(1)
        assert start.wait() == 0, start.text
        assert start.summary["counters"]["begun"] == NUM_ROWS, "a row was begun twice"
    status = read_status(output)
    assert sorted(writer.reason for writer in status.writers) == ["done", "drained"]
    assert sum(writer.num_ok for writer in status.writers) == NUM_ROWS
    assert_same(read_outputs(output), undisturbed)


@pytest.mark.timeout(240)
def test_the_end_of_the_job_drains_without_a_signal_and_is_foretold(tmp_path):
    """The demo's thousand rows: too many for the time, and the drain begins before its end."""
    output, end_s = tmp_path / "run", int(time.time()) + 20
    settings = ["parallel.tp=1", *SLOW, "sampling.ignore_eos=true"]
    with Start(output, 1, settings, {"HPCINFER_END_TIME": str(end_s)}) as start:
        assert start.wait() == 3, start.text
    assert time.time() < end_s
    text = start.text
    assert text.count("rows are left; at the present") == 1, text
    assert "the end of the job's time: no row is begun any more" in text
    assert text.index("rows are left") < text.index("no row is begun")
    status = read_status(output, exact=True)
    assert status.num_done >= 20 and status.num_partial == 0
    assert start.summary["counters"]["begun"] == status.num_done


@pytest.mark.timeout(240)
def test_two_lives_of_a_job_without_a_row_end_it(tmp_path, job):
    output = tmp_path / "run"

    def live(count: int, **variables: str) -> Start:
        step = {"SLURM_JOB_ID": "71", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
        env = {**step, "SLURM_RESTART_COUNT": str(count), "SLURM_JOB_END_TIME": str(int(time.time()) + 3600), **variables}
        with Start(output, 1, [*job, "parallel.tp=1", *SLOW], env) as start:
            start.wait()
        return start

    assert live(0, SLURM_JOB_END_TIME="1000").process.returncode == 3
    killed = register_writer(open_existing(output), WriterIdentity(job="71", restart_count=1))  # while it loaded
    last = live(2)
    assert last.process.returncode == 1, last.text
    assert "the last 2 lives of job 71 committed nothing" in last.text and killed.id in last.text, last.text
    assert "-job71-rank0.log" in last.text and "Traceback" not in last.text
