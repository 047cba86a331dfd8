"""Kill anything at any moment, start again in another layout: every row once, and the text of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from hpcinfer.data.ledger.status import read_status
from hpcinfer.errors import RunDirectoryError
from tests.mpi import descendants
from tests.runs import LAYOUTS, assert_same, family, read_outputs, run_command, run_demo, start_from_python, wait_until_gone
from tests.conftest import ROOT
from tests.mpi import rank_env

SAMPLINGS = {
    "greedy": [],
    "sampled": [
        "sampling.temperature=1.0", "sampling.top_p=0.95", "sampling.n=2", "sampling.seed=7", "sampling.repetition_penalty=1.1",
        'sampling.bad_words=["ab"]', 'sampling.stop=["77", "zz"]', "sampling.min_tokens=2",
    ],
    "structured": ["sampling.temperature=1.0", "sampling.seed=3", "sampling.structured_regex=' [a-z0-9 ]{3,20}'"],
}
# Small commits and little in work at once, so that a kill finds rows committed, in memory and not begun.
SLOW = ["run.segment_s=0.2", "run.heartbeat_s=0.5", "engine.max_sequences=12", "run.linger_s=20"]
KILLS_A_ROUND = 8
ROUNDS = {"greedy": 5, "sampled": 5, "structured": 2}
"""Rounds of 8 kills for each way of sampling: `make test` runs some, `make test-full` all of them."""
GONE_WITHIN_S = 5.0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """sampling -> outputs of a run that nobody killed."""
    made = {}

    def get(sampling: str):
        if sampling not in made:
            output = tmp_path_factory.mktemp("undisturbed") / "run"
            run_demo(output, [*LAYOUTS["tp1"], *SAMPLINGS[sampling]])
            made[sampling] = read_outputs(output)
        return made[sampling]

    return get


def rounds():
    for sampling in SAMPLINGS:
        for number in range(ROUNDS[sampling]):
            always = (sampling, number) == ("sampled", 1)
            yield pytest.param(sampling, number, marks=() if always else pytest.mark.full)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("sampling", "number"), list(rounds()))
def test_kills_at_random_moments(sampling, number, tmp_path, undisturbed):
    rng = random.Random(f"{sampling} {number}")
    output, log, done_before, kills, finished = tmp_path / "run-0", tmp_path / "log", 0, [], 0
    while len(kills) < KILLS_A_ROUND:
        layout = rng.choice(list(LAYOUTS))
        part = rng.choice(["parent", "launcher", "proxy", "rank"])
        process = start_from_python(output, [*LAYOUTS[layout], *SAMPLINGS[sampling], *SLOW], log)
        delay_s = rng.choice([rng.uniform(0.2, 3.0), rng.uniform(3.0, 8.0)])
        killed = kill_after(process, part, delay_s, rng)
        if killed is None:
            assert process.returncode == 0, log.read_text()[-4000:]
            assert_same(read_outputs(output), undisturbed(sampling))
            finished += 1
            output, done_before = tmp_path / f"run-{finished}", 0
            continue
        kills.append(f"{killed} in {layout} after {delay_s:.1f} s")
        done = committed(output)
        assert done >= done_before, f"rows vanished: {done_before} -> {done}; {kills}"
        done_before = done
    run_demo(output, [*LAYOUTS[rng.choice(list(LAYOUTS))], *SAMPLINGS[sampling]])
    assert_same(read_outputs(output), undisturbed(sampling))


def kill_after(process: subprocess.Popen, part: str, delay_s: float, rng: random.Random) -> str | None:
    """SIGKILL one process of a start after a delay, and see all others gone; None when it ended by itself before."""
    try:
        process.wait(delay_s)
        return None
    except subprocess.TimeoutExpired:
        pass
    pids = [process.pid, *descendants(process.pid)]
    members = family(process.pid)
    part = part if members[part] else "parent"  # one rank runs in the parent itself; a launcher may not be there yet
    victim = rng.choice(members[part])
    try:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:
        pass
    # A launcher that loses a rank ends the others and itself; the parent then reports and ends.
    left = wait_until_gone([pid for pid in {*pids, *descendants(process.pid)} if pid != process.pid], GONE_WITHIN_S)
    assert not left, f"killed {part}: {left} live on"
    process.wait(GONE_WITHIN_S)
    return part


def committed(output: Path) -> int:
    """(row, sample) pairs committed so far."""
    try:
        status = read_status(output, exact=True)
    except RunDirectoryError:
        return 0
    return status.num_done + status.num_failed


@pytest.mark.timeout(300)
def test_two_runs_started_at_once_share_the_work(tmp_path, undisturbed):
    output = tmp_path / "run"
    settings = {"tp2": [*LAYOUTS["tp2"], *SLOW], "tp1": [*LAYOUTS["tp1"], *SLOW]}
    processes = [
        subprocess.Popen(
            run_command(output, settings[layout]), cwd=ROOT, env=rank_env(), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for layout in settings
    ]
    texts = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(texts)
    assert_same(read_outputs(output), undisturbed("greedy"))
    status = read_status(output)
    assert status.complete and len(status.writers) == 2
    assert all(writer.num_ok > 0 for writer in status.writers), "one of them did all the work"


@pytest.mark.timeout(300)
def test_a_row_cut_short_goes_on_where_it_stopped(tmp_path, undisturbed):
    """SIGTERM drains: partial rows are committed with their tokens, the next life goes on from them."""
    output = tmp_path / "run"
    settings = [*LAYOUTS["tp1"], *SAMPLINGS["sampled"], *SLOW, "run.drain_s=0"]
    for _ in range(6):
        process = subprocess.Popen(
            run_command(output, settings), cwd=ROOT, env=rank_env(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for_rows(output, committed(output) + 50, process)
        process.send_signal(signal.SIGTERM)
        if process.wait(60) == 0:
            break
        assert process.returncode == 3
        status = read_status(output, exact=True)
        if status.num_partial:
            break
    assert status.num_partial > 0, "no row was cut short"
    result = run_demo(output, [*LAYOUTS["pp2"], *SAMPLINGS["sampled"]])
    assert_same(read_outputs(output), undisturbed("sampled"))
    assert "complete" not in result.stderr


def wait_for_rows(output: Path, count: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 100
    while committed(output) < count and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.05)
