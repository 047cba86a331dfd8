"""When the job ends, as far as variables and Slurm say."""

from __future__ import annotations

import os
import stat

import pytest

from hpcinfer.launch import walltime
from hpcinfer.launch.env import LaunchEnvironment
from hpcinfer.launch.walltime import job_end_s

JOB = {"SLURM_JOB_ID": "71"}


def refuse(command):
    raise AssertionError(f"{command} was run")


@pytest.mark.parametrize(
    ("variables", "end"),
    [({}, None), ({"HPCINFER_END_TIME": "1700"}, 1700), ({**JOB, "SLURM_JOB_END_TIME": "1800"}, 1800)],
)
def test_slurm_is_not_asked_where_there_is_no_job_or_a_variable(variables, end):
    assert job_end_s(LaunchEnvironment(variables), run=refuse) == end


@pytest.mark.parametrize(("printed", "end"), [("1795726435\n", 1795726435.0), ("NONE\n", None), ("", None), ("N/A", None)])
def test_an_older_slurm_is_asked(printed, end):
    asked = []

    def run(command):
        asked.append(command)
        return printed

    task = LaunchEnvironment({**JOB, "SLURM_ARRAY_JOB_ID": "71", "SLURM_ARRAY_TASK_ID": "2"})
    assert job_end_s(task, run=run) == end
    assert asked == [["squeue", "--noheader", "--jobs=71_2", "--format=%e"]]


@pytest.mark.parametrize(
    ("script", "end"),
    [
        ('[ "$SLURM_TIME_FORMAT" = %s ] && echo 1234', 1234.0),
        ("echo 1234; exit 1", None),
        ("sleep 60", None),
        (None, None),
    ],
    ids=["answers", "fails", "does not answer", "is not there"],
)
def test_the_command_itself(script, end, tmp_path, monkeypatch):
    if script:
        squeue = tmp_path / "squeue"
        squeue.write_text(f"#!/bin/sh\n{script}\n")
        squeue.chmod(squeue.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin" if script else str(tmp_path))
    monkeypatch.setattr(walltime, "_TIMEOUT_S", 1.0 if script and "sleep" in script else 10.0)
    assert job_end_s(LaunchEnvironment(JOB)) == end
