"""Slurm's commands: what they are given, and what becomes of their errors. A stand-in for sbatch writes down what it gets."""

from __future__ import annotations

import os

import pytest

from hpcinfer.errors import LaunchError
from hpcinfer.launch import slurm


@pytest.fixture
def sbatch(monkeypatch, tmp_path):
    """Puts an sbatch first on the path that answers with `body`; returns the file with what it got."""

    def install(body: str):
        program = tmp_path / "sbatch"
        program.write_text(f'#!/bin/bash\n{{ printf "%s\\n" "$@"; cat; }} > "{tmp_path}/got"\n{body}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return tmp_path / "got"

    return install


def test_a_script_is_checked_and_submitted(sbatch):
    got = sbatch('echo "sbatch: Job 5 to start at 2026-11-26T19:00:00 using 4 processors" >&2')
    assert slurm.check_script("the script\n") == "Job 5 to start at 2026-11-26T19:00:00 using 4 processors"
    assert got.read_text() == "--test-only\nthe script\n"
    got = sbatch("echo '123;cluster'")
    assert slurm.submit_script("the script \udcff\n", ["--job-name", "a b"]) == 123
    assert got.read_bytes() == b"--parsable\n--job-name\na b\nthe script \xff\n"


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        ("sbatch: error: invalid partition specified: nope", "sinfo -o %P"),
        ("allocation failure: Invalid account or account/partition combination specified", "slurm.account"),
        ("sbatch: error: Invalid qos specification", "slurm.qos"),
        ("allocation failure: Requested time limit is invalid (missing or exceeds some limit)", "--time"),
        ("sbatch: error: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)", "sacctmgr show qos"),
        ("allocation failure: Invalid feature specification", "slurm.constraint"),
        ("sbatch: error: Invalid generic resource (gres) specification", "gpus_per_node"),
        ("allocation failure: Requested node configuration is not available", "sinfo -Nl"),
        ("allocation failure: Node count specification invalid", "--nodes"),
        ("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)", "scontrol ping"),
        ("something else", "--dry-run"),
    ],
)
def test_refusals_come_with_a_fix(sbatch, said, fix):
    sbatch(f'echo "{said}" >&2; exit 1')
    with pytest.raises(LaunchError, match="sbatch --test-only refuses the job") as caught:
        slurm.check_script("x")
    assert caught.value.found == said and fix in caught.value.fix
    with pytest.raises(LaunchError, match="sbatch refuses the job"):
        slurm.submit_script("x")


def test_no_sbatch_no_answer_no_number(sbatch, monkeypatch, tmp_path):
    sbatch("echo submitted")
    with pytest.raises(LaunchError, match="did not say which job"):
        slurm.submit_script("x")
    monkeypatch.setattr(slurm, "_TIMEOUT_S", 0.2)
    sbatch("exec sleep 60")
    with pytest.raises(LaunchError, match="did not answer within"):
        slurm.submit_script("x")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(LaunchError, match="no sbatch here") as caught:
        slurm.submit_script("x")
    assert "--dry-run" in caught.value.fix
