"""A rank is stopped while nobody waits for it in a transfer: the next one in the ring of heartbeats says so and ends all."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from hpcinfer.errors import ExitCode
from tests.mpi import descendants, kill_tree, run_ranks, start_world_process
from tests.runs import wait_until_gone


@pytest.mark.timeout(90)
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.full), pytest.param(2, marks=pytest.mark.full)])
def test_a_stopped_rank_is_reported(victim):
    process = start_world_process(3, ["-m", "tests.faults.silent_rank", "60"])
    try:
        assert process.stdout.readline() == "ready\n"
        ranks = {}
        for pid in descendants(process.pid):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            ranks.update({int(v[len(b"PMI_RANK="):]): pid for v in variables if v.startswith(b"PMI_RANK=")})
        time.sleep(1.5)  # some heartbeats
        began = time.monotonic()
        os.kill(ranks[victim], signal.SIGSTOP)
        stderr = process.communicate(timeout=30)[1]
        ended_s = time.monotonic() - began
        assert not wait_until_gone(list(ranks.values()), 2)
    finally:
        kill_tree(process.pid)
    assert 1.5 < ended_s < 12, f"{ended_s:.1f} s after it was stopped: twice the deadline of 1 s is the limit\n{stderr}"
    assert f"rank {victim} on host {os.uname().nodename} has been silent" in stderr, stderr
    assert process.returncode == ExitCode.RESUMABLE, "on other nodes it may go well"
    assert "last heard at tick 812" in stderr and f"error on rank {(victim + 1) % 3} of 3" in stderr, stderr


@pytest.mark.timeout(90)
def test_ranks_that_come_to_their_end_part_without_a_word():
    result = run_ranks(3, ["-m", "tests.faults.silent_rank", "0.5"], timeout_s=60).check()
    assert "error" not in result.output, result.output
