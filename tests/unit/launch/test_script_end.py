"""What a job's script makes of the markers in the run directory, once its ranks have ended."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hpcinfer.launch import lives

STUBS = """\
set -u
run=$1 scratch=/nonexistent me=7 life=1 chain=7 max_lives=5 SLURM_JOB_ID=7
say() { echo "$*"; }
finish() { exit "$1"; }
on_every_node() { :; }
ended_by() { :; }
scontrol() { :; }
"""


def end(run: Path, *, code: int, meanwhile: dict[str, str]) -> tuple[int, str]:
    """Exit code and words of a script whose ranks write files and end with `code`."""
    for folder in ("writers", "segments", "logs"):
        (run / folder).mkdir(exist_ok=True, parents=True)
    (run / "run.json").touch()
    writes = "; ".join(f"echo {text} >'{run}/{name}'" for name, text in meanwhile.items()) or ":"
    script = f"{STUBS}\n{lives.BEFORE}\n({writes}; exit {code}) &\npids=($!)\n{lives.AFTER}"
    result = subprocess.run(["bash", "-c", script, "script", run], capture_output=True, text=True, timeout=60, check=False)
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
        ({}, 0, {"trial.json": "1"}, True),
        ({"trial.json": "1"}, 0, {}, False),
        ({"trial.json": "1"}, 0, {"trial.json": "2"}, True),
    ],
    ids=lambda value: str(value).replace("'", ""),
)
def test_a_marker_that_is_new_ends_the_job(before, code, meanwhile, is_complete, tmp_path):
    (tmp_path / "run").mkdir()
    for name, text in before.items():
        (tmp_path / "run" / name).write_text(text)
    found, words = end(tmp_path / "run", code=code, meanwhile=meanwhile)
    assert ("the run is complete" in words, found) == ((True, 0) if is_complete else (False, 3)), words
