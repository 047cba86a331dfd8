"""The verb submit: its script, its errors and its report, with a stand-in for sbatch."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from hpcinfer.cli import main as cli
from tests.conftest import ROOT


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the demo job, two sites, and an sbatch that writes down how it is called and answers with the call's number."""
    for name in ("jobs", "datasets"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "here.toml").write_text('[slurm]\nranks_per_node = 2\npartition = "debug"\n')
    (tmp_path / "forbids.toml").write_text("[slurm]\nranks_per_node = 2\nrequeue = false\n")
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/bash\necho "$@" >> "{tmp_path}/calls"; cat > "{tmp_path}/script"\n'
        f'case $1 in --test-only) echo "sbatch: Job 1 to start now" >&2 ;; *) wc -l < "{tmp_path}/calls" ;; esac\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HPCINFER_SITE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def calls(folder):
    return (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []


def test_it_checks_submits_and_says_what_next(workplace, capsys):
    assert cli.main(["submit", "jobs/demo.toml", "--site", "./here.toml", "--nodes", "2", "--time", "04:00:00"]) == 0
    assert capsys.readouterr().out == (
        "Submitted job 2: jobs/demo.toml on 2 nodes with 4 ranks, 04:00:00 each life.\n"
        "  slurm     Job 1 to start now\n"
        "  status    hpcinfer status runs/demo\n"
        "  queue     squeue --jobs=2\n"
        "  log       tail -F demo-2.log\n"
        "  stop      scancel 2\n"
        "  result    hpcinfer inspect runs/demo/generations.h5\n"
    )
    assert calls(workplace) == ["--test-only", "--parsable --job-name demo"]
    script = (workplace / "script").read_text()
    assert "#SBATCH --partition=debug\n" in script and "#SBATCH --time=04:00:00\n" in script and "HPCINFER_SITE=./here.toml\n" in script


def test_json_arrays_and_jobs_in_the_place_of_tasks(workplace, capsys):
    assert cli.main(["submit", "jobs/demo.toml", "--site", "./here.toml", "--array", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["jobs"], report["commands"]["log"]) == ([2], "tail -F demo-2_*.log")
    assert report["shape"] == {"tasks": 3, "steps": 1, "nodes": 1, "ranks": 2}
    assert cli.main(["submit", "jobs/demo.toml", "--site", "./forbids.toml", "--array", "2", "--name", "mine", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert calls(workplace)[-2:] == ["--parsable --job-name mine-1", "--parsable --job-name mine-2"]
    assert report["jobs"] == [4, 5]
    # Every life has a number of its own there; the names stay.
    found = {name: report["commands"][name] for name in ("log", "queue", "stop")}
    assert found == {
        "log": "tail -F mine-1-*.log mine-2-*.log", "queue": "squeue --me --name=mine-1,mine-2",
        "stop": "scancel --user=$USER --name=mine-1; scancel --user=$USER --name=mine-2",
    }


def test_settings_and_the_variable_for_the_site(workplace, capsys, monkeypatch):
    monkeypatch.setenv("HPCINFER_SITE", "./here.toml")
    arguments = ["--set", "parallel.tp=1", "--set", "data.output=-out", "--dry-run"]
    assert cli.main(["submit", "jobs/demo.toml", *arguments]) == 0
    script = capsys.readouterr().out
    assert "    --set parallel.tp=1\n    --set data.output=-out\n" in script and "\nrun=./-out\n" in script
    assert "export HPCINFER_SITE=./here.toml\n" in script
    assert not calls(workplace)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent.toml"], "cannot read the job file absent.toml"),
        (["jobs/demo.toml", "--site", "absent"], "no site 'absent'"),
        (["jobs/demo.toml", "--time", "soon"], "--time = 'soon'"),
        (["jobs/demo.toml", "--time", "2"], "slurm.signal_s = 120"),
        (["jobs/demo.toml", "--name", "a b"], "letters, digits"),
        (["jobs/demo.toml", "--nodes", "3", "--array", "2"], "give --nodes 4"),
        (["jobs/demo.toml", "--set", "parallel.tp=9"], "tp"),
        (["jobs/demo.toml", "--set", "parallel.pp=9"], "more stages than there are layers"),
        (["jobs/demo.toml", "--set", "model.path=absent"], "absent"),
        (["jobs/demo.toml", "--array", "many"], "invalid int"),
    ],
)
def test_what_is_wrong_is_said_before_slurm_is_asked(workplace, capsys, arguments, words):
    assert cli.main(["submit", *arguments]) in (1, 2)
    shown = capsys.readouterr()
    assert words in shown.err and "Traceback" not in shown.err and not shown.out
    assert not calls(workplace)


@pytest.mark.parametrize("name", ["50%", "back\\slash"])
def test_folders_whose_log_slurm_would_lose_are_refused(workplace, capsys, monkeypatch, name):
    folder = workplace / name
    folder.mkdir()
    monkeypatch.chdir(folder)
    shutil.copytree(ROOT / "jobs", folder / "jobs")
    (folder / "datasets").symlink_to(ROOT / "datasets")
    assert cli.main(["submit", "jobs/demo.toml"]) == 2
    assert "submit from a folder without them" in capsys.readouterr().err
    assert not calls(workplace)


def test_a_refusal_is_passed_on_and_nothing_is_submitted(workplace, capsys):
    (workplace / "bin" / "sbatch").write_text('#!/bin/bash\necho "sbatch: error: invalid partition specified: debug" >&2; exit 1\n')
    assert cli.main(["submit", "jobs/demo.toml", "--site", "./here.toml"]) == 1
    shown = capsys.readouterr()
    assert "sbatch --test-only refuses the job" in shown.err and "sinfo -o %P" in shown.err and not shown.out


def test_a_refusal_half_way_names_the_jobs_that_are_there(workplace, capsys):
    program = workplace / "bin" / "sbatch"
    program.write_text(program.read_text() + f'(( $(wc -l < "{workplace}/calls") < 4 )) || {{ echo "sbatch: error: QOSMaxSubmit" >&2; exit 1; }}\n')
    assert cli.main(["submit", "jobs/demo.toml", "--site", "./forbids.toml", "--array", "4"]) == 1
    shown = capsys.readouterr()
    assert "QOSMaxSubmit" in shown.err and "submitted so far: 2 3; keep them, or: scancel 2 3" in shown.err and not shown.out
