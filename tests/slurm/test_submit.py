"""`hpcinfer submit` on a real cluster: the job runs, joins, drains, goes on, and survives odd names."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from hpcinfer.data.generations import GenerationFile
from tests.conftest import ROOT
from tests.runs import assert_same, read_outputs, run_demo
from tests.slurm.jobs import SMALL_SITE, logs, site_file, submit, submit_demo, toml, wait_for, writer_jobs


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    """What the demo job generates on this host, without Slurm."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    run_demo(output, ["parallel.tp=1"])
    return read_outputs(output)


def samples_of(outputs: dict, number: int) -> dict:
    """What a greedy run with `sampling.n` generates: each sample of a row is the row's text."""
    return {(row, sample): found for (row, _), found in outputs.items() for sample in range(number)}


def test_two_nodes_in_one_step(cluster, workplace, undisturbed):
    report = submit_demo(cluster, workplace, "--nodes", "2", "--time", "5", settings=["comm.deadline_s=100"])
    assert report["shape"] == {"tasks": 1, "steps": 1, "nodes": 2, "ranks": 4}
    record = cluster.wait(report["jobs"][0])
    assert (record["JobState"], record["NumNodes"]) == ("COMPLETED", "2"), logs(workplace)
    assert "on 4 ranks (dp 2 x pp 1 x sp 1 x tp 2)" in logs(workplace)
    assert_same(read_outputs(workplace / "run"), undisturbed)


def test_an_array_joins_one_run(cluster, workplace, undisturbed):
    report = submit_demo(cluster, workplace, "--array", "3", "--time", "5", settings=["sampling.n=4"])
    assert report["shape"] == {"tasks": 3, "steps": 1, "nodes": 1, "ranks": 2}
    [job] = report["jobs"]
    cluster.wait(job)
    assert [task["JobState"] for task in cluster.tasks(job)] == ["COMPLETED"] * 3, logs(workplace)
    assert_same(read_outputs(workplace / "run"), samples_of(undisturbed, 4))
    # On a busy machine one of them may come when all is done.
    assert len(writer_jobs(workplace) & {task["JobId"] for task in cluster.tasks(job)}) >= 2


def test_steps_of_one_job(cluster, workplace, undisturbed):
    report = submit_demo(cluster, workplace, "--steps", "--time", "5", settings=["parallel.tp=1", "sampling.n=4"])
    assert report["shape"] == {"tasks": 1, "steps": 2, "nodes": 1, "ranks": 2}
    record = cluster.wait(report["jobs"][0])
    assert record["JobState"] == "COMPLETED", logs(workplace)
    assert_same(read_outputs(workplace / "run"), samples_of(undisturbed, 4))
    identities = [json.loads(path.read_text()) for path in (workplace / "run" / "writers").glob("*.json")]
    assert len({identity["step"] for identity in identities}) == 2
    assert writer_jobs(workplace) == {str(report["jobs"][0])}


def test_a_drained_job_goes_on(cluster, workplace, undisturbed):
    """USR1 comes to the batch shell from a user (test_faults.py has the time limit): the job requeues itself and completes."""
    settings = ["parallel.tp=1", "sampling.n=4", "run.segment_rows=64", "run.segment_s=0.5"]
    report = submit_demo(cluster, workplace, "--time", "5", site={"slurm": {"ranks_per_node": 1}}, settings=settings)
    [job] = report["jobs"]
    segments = workplace / "run" / "segments"
    wait_for(lambda: segments.is_dir() and len(list(segments.glob("*.h5"))) > 2, within_s=100)
    cluster.run("scancel", "--signal=USR1", "--batch", str(job))
    wait_for(lambda: cluster.job(job)["Restarts"] == "1", within_s=60)
    first_life = list(segments.glob("*.h5"))
    record = cluster.wait(job)
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "1"), logs(workplace)
    assert "life 1: not complete; it is requeued and goes on" in logs(workplace)
    assert first_life
    assert_same(read_outputs(workplace / "run"), samples_of(undisturbed, 4))


ODD = "a b'c\"d\ne$HOME`f`\\g%h#i;j&k 漢"
"""Everything that a shell, Slurm or a parser might take for its own."""


def test_odd_names(cluster, tmp_path):
    """A real job whose folders, files and settings are called what no one should call them."""
    here = tmp_path / "-in a 'folder'\nwith \"breaks\" #漢"
    here.mkdir()
    model, prompts = here / f"--model {ODD}", here / f"-prompts {ODD}.h5"
    shutil.copytree(ROOT / "datasets" / "demo-model", model)
    shutil.copy(ROOT / "datasets" / "demo" / "prompts.h5", prompts)
    tables = {"model": {"path": model.name, "dtype": "float32"}, "data": {"prompts": "elsewhere", "output": "elsewhere"}}
    (here / f"-job {ODD}.toml").write_text(toml(tables))
    site = site_file(here / f"-site {ODD}", SMALL_SITE)
    arguments = ["--site", f"./{site.relative_to(here)}", "--time", "5", "--set", f"data.prompts={prompts.name}"]
    arguments += ["--set", f"data.output=-run {ODD}", "--set", "sampling.max_tokens=3"]
    report = submit(cluster, *arguments, "--", f"-job {ODD}.toml", cwd=here)
    record = cluster.wait(report["jobs"][0])
    assert record["JobState"] == "COMPLETED", logs(here)
    # The setting has reached the ranks.
    with GenerationFile(here / f"-run {ODD}" / "generations.h5") as file:
        generations = list(file)
    assert len(generations) == 1000 and max(len(generation.token_ids) for generation in generations) == 3
    # The commands that submit prints are for a shell.
    command = report["commands"]["result"].replace("hpcinfer", f"{sys.executable} -m hpcinfer", 1)
    assert "1,000 rows" in cluster.run("bash", "-c", command, cwd=here).stdout


@pytest.mark.parametrize("arguments", [["--nodes", "2"], ["--array", "3"], ["--steps"]], ids=" ".join)
def test_a_dry_run_is_what_slurm_accepts(cluster, workplace, arguments):
    file = site_file(workplace / "site", {"slurm": {"ranks_per_node": 4, "gpus_per_node": 2, "qos": "", "options": ["--exclusive"]}})
    command = [sys.executable, "-m", "hpcinfer", "submit", "jobs/demo.toml", "--site", str(file), *arguments, "--dry-run"]
    script = cluster.run(*command, cwd=workplace).stdout
    verdict = cluster.run("sbatch", "--test-only", stdin=script, cwd=workplace).stderr
    nodes = int(arguments[1]) if arguments[0] == "--nodes" else 1
    assert re.search(r"Job \d+ to start at", verdict) and len(re.findall(r"n\[1-2\]|n1", verdict)) == 1, verdict
    assert ("n[1-2]" in verdict) == (nodes == 2)
    assert cluster.run("squeue", "--noheader").stdout == ""


@pytest.mark.parametrize(
    ("slurm", "words"),
    [
        ({"partition": "nope"}, ["invalid partition", "sinfo -o %P"]),
        ({"gpus_per_node": 3, "ranks_per_node": 2}, ["node configuration", "sinfo -Nl"]),
        ({"constraint": "ib"}, ["Invalid feature", "sinfo -o '%N %f'"]),
        ({"options": ["--nonsense=1"]}, ["unrecognized option '--nonsense=1'", "out of the site's options"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else next(iter(value)),
)
def test_what_slurm_refuses_is_said_with_the_fix(cluster, workplace, slurm, words):
    file = site_file(workplace / "site", {"slurm": slurm})
    error = submit(cluster, "jobs/demo.toml", "--site", file, cwd=workplace, check=False)["error"]
    assert error.startswith("hpcinfer: sbatch --test-only refuses the job"), error
    assert all(word in error for word in words), error
    assert cluster.run("squeue", "--noheader").stdout == ""
