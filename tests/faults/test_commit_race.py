"""Several processes on one run directory, some of them killed: every row once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def race(scratch: Path, processes: int, kills: int, rows: int, samples: int, seed: int) -> dict[str, float]:
    """Counts of a race; the harness has checked the output."""
    command = [sys.executable, HERE / "shim" / "harness.py", "race", scratch, processes, kills, rows, samples, seed]
    done = subprocess.run(
        list(map(str, command)), env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=200, check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("processes", [2, 4])
def test_started_at_once_without_a_run_directory(tmp_path: Path, processes: int) -> None:
    outcome = race(tmp_path, processes, 0, 500, 1, seed=1)
    assert outcome["duplicates"] == 0, "two live writers ran one row"
    assert outcome["takeovers"] == 0
    assert outcome["writers"] == processes + 1


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random(tmp_path: Path, seed: int) -> None:
    outcome = race(tmp_path, 4, 10, 700, 1 + seed % 2, seed)
    assert outcome["takeovers"] > 0, "no claim of a dead writer was taken over: nothing was tested"


@pytest.mark.full
@pytest.mark.parametrize("seed", range(10, 18))
def test_killed_at_random_more(tmp_path: Path, seed: int) -> None:
    race(tmp_path, 2 + seed % 3, 20, 900, 1 + seed % 3, seed)
