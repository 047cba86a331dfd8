"""Runs of the demo job for tests: started as a user starts them, killed as clusters kill them, and compared."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpcinfer.data.generations import GenerationFile
from hpcinfer.request import Status
from tests.conftest import ROOT
from tests.mpi import alive, descendants, rank_env

JOB = "jobs/demo.toml"
LAYOUTS: dict[str, list[str]] = {
    "tp1": ["parallel.tp=1"],
    "tp2": ["parallel.tp=2"],
    "pp2": ["parallel.tp=1", "parallel.pp=2"],
    "pp3": ["parallel.tp=1", "parallel.pp=3"],
    "dp2": ["parallel.tp=1", "parallel.dp=2"],
    "tp2 x pp2": ["parallel.tp=2", "parallel.pp=2"],
    "dp2 x tp2": ["parallel.tp=2", "parallel.dp=2"],
    "sp2": ["parallel.tp=1", "parallel.sp=2", "parallel.sp_min_tokens=10"],
    "tp2, two-batch": ["parallel.tp=2", "parallel.two_batch=2"],
    "pp2 x sp2, 3 microbatches": [
        "parallel.tp=1", "parallel.pp=2", "parallel.sp=2", "parallel.sp_min_tokens=10", "parallel.microbatches=3",
    ],
    "sp2 x tp2, sequence form, two-batch": [
        "parallel.tp=2", "parallel.sp=2", "parallel.sp_min_tokens=10", "parallel.sequence_form=true", "parallel.two_batch=2",
    ],
}


def run_command(output: Path, settings: Sequence[str]) -> list[str]:
    """`hpcinfer run` of the demo job into `output`, with settings on top of its own."""
    command = [sys.executable, "-m", "hpcinfer", "run", JOB, "--set", f"data.output={output}"]
    return command + [word for setting in settings for word in ("--set", setting)]


def run_demo(output: Path, settings: Sequence[str], *, timeout_s: float = 180, expect: int = 0) -> subprocess.CompletedProcess:
    """Run the demo job to its end and check the exit code."""
    result = subprocess.run(
        run_command(output, settings), cwd=ROOT, env=rank_env(), capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert result.returncode == expect, f"exit code {result.returncode}\n{result.stdout}{result.stderr}"
    return result


def start_from_python(output: Path, settings: Sequence[str], log: Path) -> subprocess.Popen:
    """The demo job started by `hpcinfer.run` in a parent process, which then has a launcher and ranks below it."""
    code = "import sys, hpcinfer; s = hpcinfer.run(sys.argv[1], sys.argv[2:], quiet=False); sys.exit(0 if s.complete else 3)"
    with open(log, "ab") as file:
        return subprocess.Popen(
            [sys.executable, "-c", code, JOB, f"data.output={output}", *settings],
            cwd=ROOT, env=rank_env(), stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
        )


def family(parent: int) -> dict[str, list[int]]:
    """The processes of a start by their part: parent, launcher, proxy, rank."""
    parts: dict[str, list[int]] = {"parent": [parent], "launcher": [], "proxy": [], "rank": []}
    for pid in descendants(parent):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        program = os.path.basename(command[0]).decode()
        if program.startswith("hydra_pmi_proxy") or program.startswith("hydra_bstrap"):
            parts["proxy"].append(pid)
        elif program.startswith("mpiexec"):
            parts["launcher"].append(pid)
        else:
            parts["rank"].append(pid)
    return parts


def wait_until_gone(pids: Sequence[int], within_s: float) -> list[int]:
    """The pids that are still there after `within_s` seconds; returns as soon as there are none."""
    end = time.monotonic() + within_s
    while left := [pid for pid in pids if alive(pid)]:
        if time.monotonic() > end:
            return left
        time.sleep(0.02)
    return []


def read_outputs(output: Path) -> dict[tuple[int, int], tuple[list[int], str, int]]:
    """(row, sample) -> (token ids, text, finish reason) of a merged run; fails on duplicates and on rows that are not ok."""
    found: dict[tuple[int, int], tuple[list[int], str, int]] = {}
    with GenerationFile(output / "generations.h5") as file:
        for generation in file:
            assert generation.key not in found, f"{generation.key} is there twice"
            assert generation.status is Status.OK, generation
            found[generation.key] = (generation.token_ids.tolist(), generation.text, int(generation.finish_reason))
    return found


def assert_same(outputs: Mapping, undisturbed: Mapping) -> None:
    """Every (row, sample) once, with the text of an undisturbed run."""
    assert outputs.keys() == undisturbed.keys()
    differing = [key for key in outputs if outputs[key] != undisturbed[key]]
    assert not differing, f"{len(differing)} rows differ, the first: {differing[0]}: {outputs[differing[0]]}"
