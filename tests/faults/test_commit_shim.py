"""A process is killed, or the storage refuses, at each system call of a commit and of a whole life: nothing
acknowledged is lost, nothing half is counted, and the next life completes all.

One subprocess a test forks a life for each call (tests/faults/shim/harness.py); the shim is compiled here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KILLS = ["kill-before", "kill-after", "torn"]
TROUBLES = ["short", "fail-one", "fail-from"]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the LD_PRELOAD shim: apt-get install gcc")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "shim" / "shim.c", "-ldl"], check=True)
    return library


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """Memory where there is some: a killed process loses nothing of the page cache, so that fsync need not be waited
    for.
    """
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(dir=memory))
    yield folder
    shutil.rmtree(folder)


def lives(
    shim: Path, scratch: Path, scenario: str, action: str, *calls: int | str, error: str = "ENOSPC"
) -> dict[str, int]:
    """Counts of what became of the lives that were hit at `calls`."""
    environment = {**os.environ, "LD_PRELOAD": str(shim), "PYTHONPATH": str(ROOT), "SHIM_ERRNO": error}
    command = [sys.executable, HERE / "shim" / "harness.py", scenario, shim, scratch, action, *map(str, calls)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("action", KILLS)
def test_killed_at_every_call_of_the_commits(shim: Path, scratch: Path, action: str) -> None:
    outcomes = lives(shim, scratch, "commit", action, "all")
    # Commits, a compaction and the final one: fewer calls would mean that the shim no longer sees them.
    assert outcomes["killed"] == outcomes["lives"] >= 40
    assert outcomes["acknowledged"] > 0


@pytest.mark.parametrize("action", KILLS)
def test_killed_while_draining(shim: Path, scratch: Path, action: str) -> None:
    outcomes = lives(shim, scratch, "drain", action, "all")
    assert outcomes["killed"] == outcomes["lives"] >= 8


@pytest.mark.full
@pytest.mark.parametrize("offset", range(4))
@pytest.mark.parametrize("action", KILLS)
def test_killed_in_a_whole_life(shim: Path, scratch: Path, action: str, offset: int) -> None:
    """From the creation of the run directory to the marker of completion: claims, heartbeats, merge."""
    outcomes = lives(shim, scratch, "whole", action, *range(1 + offset, 400, 4))
    assert outcomes["killed"] == outcomes["lives"] >= 35


@pytest.mark.parametrize("error", ["EINTR", "EIO", "ENOSPC", "EDQUOT"])
def test_one_call_fails(shim: Path, scratch: Path, error: str) -> None:
    """The row stays in memory and the commit is repeated: the same life completes."""
    outcomes = lives(shim, scratch, "commit", "fail-one", *range(1, 60, 2), error=error)
    assert outcomes["undisturbed"] == outcomes["lives"] >= 25


def test_short_writes(shim: Path, scratch: Path) -> None:
    outcomes = lives(shim, scratch, "commit", "short", *range(2, 60, 3))
    assert outcomes["undisturbed"] == outcomes["lives"] >= 15


@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
def test_the_storage_refuses_for_good(shim: Path, scratch: Path, error: str) -> None:
    """Exit code 3, and the next life completes."""
    outcomes = lives(shim, scratch, "commit", "fail-from", *range(1, 60, 5), error=error)
    assert outcomes["resumable"] >= 9
    assert outcomes["killed"] == 0


@pytest.mark.full
@pytest.mark.parametrize("action", TROUBLES)
def test_trouble_in_a_whole_life(shim: Path, scratch: Path, action: str) -> None:
    outcomes = lives(shim, scratch, "whole", action, *range(1, 400, 7))
    assert outcomes["killed"] == 0 and outcomes["lives"] >= 20
