"""The table and the JSON, and the whole examination in one process."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from hpcinfer.cli import main as cli
from hpcinfer.config.load import load_job
from hpcinfer.doctor.examine import name_places
from hpcinfer.doctor.facts import Facts, judge
from hpcinfer.doctor.finding import Level, RankPlace, absent, by_value, green, red, who, yellow
from hpcinfer.doctor.launch import LoginFacts
from hpcinfer.doctor.memory import MemoryFacts
from hpcinfer.doctor.model import gather_files, gather_model
from hpcinfer.doctor.report import Report, report_json, report_text
from tests.conftest import ROOT
from tests.doctor_facts import GIB, healthy_facts, place, reds
from tests.mpi import rank_env

REPORT = Report(
    num_ranks=2, num_nodes=1, job="job.toml", seconds=1.25,
    findings=(
        green("disk", "fine"), yellow("clock", "late", "wind it", [place(0)]), red("door", "shut", "open it"),
        absent("cat", "none"),
    ),
)
TABLE = """\
hpcinfer doctor job.toml: 2 ranks on 1 node

green     disk   fine
yellow    clock  late
                 fix: wind it
red       door   shut
                 fix: open it
not here  cat    none

1 red, 1 yellow, 1 green, 1 not here; 1.2 s"""


def test_the_table():
    assert report_text(REPORT) == TABLE
    coloured = report_text(REPORT, colour=True)
    assert "\033[1;31mred       \033[0mdoor" in coloured
    assert REPORT.has_reds and not Report(num_ranks=1, num_nodes=1, job="", seconds=0, findings=REPORT.findings[:2]).has_reds


def test_the_json():
    report = json.loads(report_json(REPORT))
    assert report["ok"] is False and report["counts"] == {"green": 1, "yellow": 1, "red": 1, "not here": 1}
    assert report["findings"][1] == {"check": "clock", "level": "yellow", "found": "late", "fix": "wind it", "where": ["n0"]}
    assert "\n" not in report_json(REPORT)


def test_words_for_ranks():
    places = [place(rank, ranks_a_node=4) for rank in (0, 1, 2, 5, 7)]
    assert who(places) == "ranks 0-2 on n0; ranks 5, 7 on n1"
    assert who([place(2 * node) for node in range(8)]).endswith("rank 10 on n5 and 2 more hosts")
    groups = by_value([(places[0], "a"), (places[1], "b"), (places[2], "b")])
    assert list(groups) == ["b", "a"]


def test_nodes_of_one_name_are_told_apart():
    assert [each.host for each in name_places([("a", 0, 0), ("a", 1, 0), ("b", 2, 0)])] == ["a#0", "a#1", "b"]
    assert name_places([("a", 0, 0), ("a", 0, 1)])[1] == RankPlace(rank=1, host="a", node=0, local_rank=1)


def login_facts(login: LoginFacts, parallel_tp: int = 2, parallel_dp: int = 0) -> Facts:
    """What a process alone gathers of the demo job."""
    facts = Facts(places=[RankPlace(host="login1")], login=login, job_path="jobs/demo.toml")
    model = ROOT / "datasets/demo-model"
    facts.job = load_job(ROOT / "jobs/demo.toml", [f"model.path={model}", f"parallel.tp={parallel_tp}", f"parallel.dp={parallel_dp}"])
    facts.model = gather_model(facts.job)
    facts.files = [gather_files(facts.places[0], model, 1)]
    facts.memory = [MemoryFacts(place=facts.places[0], free_bytes=8 * GIB)]
    return facts


def rows(facts: Facts):
    return {finding.check: finding for finding in judge(facts)}


def test_a_login_node_says_how_to_examine_the_rest():
    facts = login_facts(LoginFacts(mpi="MPICH 5.0.2", has_srun=True, flavours=("pmi2",)))
    facts.overrides = ("data.output=/a b",)
    found = rows(facts)
    assert found["all ranks"].level is Level.ABSENT
    assert found["all ranks"].fix == (
        "srun --mpi=pmi2 -N 2 --ntasks-per-node=2 hpcinfer doctor jobs/demo.toml --set 'data.output=/a b'"
    )
    assert found["weights and K/V"].level is Level.ABSENT, "the compute nodes are others"
    assert found["layout"].found == "2 ranks: dp 1 x pp 1 x sp 1 x tp 2"


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ({"parallel_dp": 2}, "-N 2 -n 4"), ({"parallel_tp": 1, "parallel_dp": 1}, "-N 1 -n 1"), ({"parallel_dp": 12}, "-N 3 -n 24"),
        ({"parallel_tp": 1}, "-N 2 --ntasks-per-node=1"), ({"parallel_tp": 24}, "-N 3 -n 24"),
    ],
)
def test_the_command_for_the_rest_has_as_many_ranks_as_the_layout(layout, shape):
    facts = login_facts(LoginFacts(mpi="MPICH 5.0.2", has_srun=True, flavours=("pmi2",)), **layout)
    assert f"--mpi=pmi2 {shape} hpcinfer" in rows(facts)["all ranks"].fix


@pytest.mark.parametrize(("tp", "dp", "ranks"), [(1, 0, 2), (1, 1, 1), (2, 2, 4)])
def test_the_command_for_the_rest_without_slurm(tp, dp, ranks):
    facts = login_facts(LoginFacts(mpi="MPICH 5.0.2"), parallel_tp=tp, parallel_dp=dp)
    assert rows(facts)["all ranks"].fix.startswith(f"mpiexec -n {ranks} hpcinfer doctor")


def test_a_laptop_is_judged_by_what_a_run_would_start():
    facts = login_facts(LoginFacts(mpi="MPICH 5.0.2"))
    found = rows(facts)
    assert found["all ranks"].fix == "mpiexec -n 2 hpcinfer doctor jobs/demo.toml"
    assert found["weights and K/V"].level is Level.GREEN
    facts.devices = [dataclasses.replace(healthy_facts().devices[0], place=facts.places[0], num_visible=1)]
    assert [finding.found for finding in reds(judge(facts))] == ["1 here, and a start of this job has 2 ranks"]
    assert not reds(judge(login_facts(LoginFacts(mpi="MPICH 5.0.2"), parallel_tp=1)))


@pytest.mark.timeout(120)
def test_an_output_that_is_no_run_is_a_finding(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").touch()
    command = [sys.executable, "-m", "hpcinfer", "doctor", "jobs/demo.toml", "--json", "--set", f"data.output={tmp_path / 'run'}"]
    result = subprocess.run(command, cwd=ROOT, env=rank_env(), capture_output=True, text=True, timeout=100, check=False)
    found = {finding["check"]: finding["level"] for finding in json.loads(result.stdout)["findings"]}
    assert found["output: run"] == "red" and found["model files"] == "green"


@pytest.mark.timeout(120)
def test_the_verb_in_one_process(tmp_path):
    result = subprocess.run(
        [
            sys.executable, "-m", "hpcinfer", "doctor", "jobs/demo.toml", "--json", "--set", f"data.output={tmp_path / 'run'}",
            "--set", "parallel.tp=1", "--sys-root", str(tmp_path / "no-fabric"),
        ],
        cwd=ROOT, env=rank_env(), capture_output=True, text=True, timeout=100, check=False,
    )
    report = json.loads(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert report["ok"] and report["ranks"] == report["nodes"] == 1 and report["seconds"] < 60
    found = {finding["check"]: finding["level"] for finding in report["findings"]}
    assert found["GPUs"] == ("green" if torch.cuda.is_available() else "not here")
    assert found["InfiniBand"] == "not here"
    assert found["output: write"] == found["model files"] == found["tokenizer"] == found["weights and K/V"] == "green"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(120)
def test_a_job_file_that_is_wrong_is_a_finding(tmp_path):
    (tmp_path / "job.toml").write_text("[model]\npaht = 'x'\n[data]\nprompts = 'p'\noutput = 'o'\n")
    result = subprocess.run(
        [sys.executable, "-m", "hpcinfer", "doctor", str(tmp_path / "job.toml"), "--json"],
        cwd=tmp_path, env=rank_env(), capture_output=True, text=True, timeout=100, check=False,
    )
    assert result.returncode == 1, result.stdout + result.stderr
    red_ones = [finding for finding in json.loads(result.stdout)["findings"] if finding["level"] == "red"]
    assert [finding["check"] for finding in red_ones] == ["job file"] and "did you mean path?" in red_ones[0]["fix"]


def test_an_override_without_a_job(capsys):
    assert cli.main(["doctor", "--set", "parallel.tp=2"]) == 2
    assert "--set without a job file" in capsys.readouterr().err
