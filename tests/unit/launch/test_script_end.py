"""What a job's script makes of the markers in the run directory, once its ranks have ended."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hpcinfer.launch import lives

STUBS = """\
set -u
run=$1 markers=($2) ender=$3 warned= scratch=/nonexistent me=7 life=1 chain=7 max_lives=5 SLURM_JOB_ID=7
say() { echo "$*"; }
finish() { exit "$1"; }
on_every_node() { :; }
ended_by() { echo "$ender"; }
scontrol() { :; }
"""


def end(run: Path, *, code: int, meanwhile: dict[str, str], markers: str = "done.json", ended_by: str = "nobody") -> tuple[int, str]:
    """Exit code and words of a script whose ranks write files and end with `code`."""
    for folder in ("writers", "segments", "logs"):
        (run / folder).mkdir(exist_ok=True, parents=True)
    (run / "run.json").touch()
    writes = "; ".join(f"echo '{text}' >'{run}/{name}'" for name, text in meanwhile.items()) or ":"
    script = f"{STUBS}\n{lives.BEFORE}\n({writes}; exit {code}) &\npids=($!)\n{lives.AFTER}"
    command = ["bash", "-c", script, "script", run, markers, ended_by]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("before", "code", "meanwhile", "is_complete"),
    [
        ({}, 0, {"done.json": "1"}, True),
        ({}, 3, {"done.json": "1"}, True),
        ({}, 0, {}, False),
        ({"done.json": "1"}, 0, {}, True),
        ({"done.json": "1"}, 3, {}, False),
        ({"done.json": "1"}, 3, {"done.json": "2"}, True),
        ({"done.json": "1"}, 0, {"writers/a.json": '"job": "7"'}, False),
    ],
    ids=lambda value: str(value).replace("'", ""),
)
def test_a_marker_that_is_new_ends_the_job(before, code, meanwhile, is_complete, tmp_path):
    (tmp_path / "run").mkdir()
    for name, text in before.items():
        (tmp_path / "run" / name).write_text(text)
    found, words = end(tmp_path / "run", code=code, meanwhile=meanwhile)
    assert ("the run is complete" in words, found) == ((True, 0) if is_complete else (False, 3)), words


@pytest.mark.parametrize("ended_by", ["Slurm", "user"])
def test_a_job_that_is_ended_is_not_complete_by_an_earlier_round(ended_by, tmp_path):
    """srun returns 0 after some forced ends."""
    (tmp_path / "done.json").touch()
    found, words = end(tmp_path, code=0, meanwhile={}, ended_by=ended_by)
    assert found == 3 and "the run is complete" not in words, words


@pytest.mark.parametrize(
    ("markers", "before", "is_complete"),
    [("done.json trial.json", "", True), ("done.json trial.json", "1", True), ("done.json", "", False), ("done.json", "1", False)],
)
def test_a_trial_ends_trials_alone(markers, before, is_complete, tmp_path):
    if before:
        (tmp_path / "trial.json").write_text(before)
    found, words = end(tmp_path, code=0 if is_complete else 3, meanwhile={"trial.json": "2"}, markers=markers)
    assert ("the run is complete" in words, found) == ((True, 0) if is_complete else (False, 3)), words
