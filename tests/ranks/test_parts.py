"""Parts of a run as users ask for them: trials, failed rows tried again, rows appended; in several layouts, killed and gone on with."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
import torch

import hpcinfer
from hpcinfer.data.generations import GenerationFile
from hpcinfer.data.ledger.status import read_status
from hpcinfer.data.prompts.prompts_writer import PromptsWriter
from hpcinfer.errors import ConfigError, RunDirectoryError
from hpcinfer.launch.env import LaunchEnvironment
from hpcinfer.launch.report import Place
from hpcinfer.launch.signals import DrainFlag
from hpcinfer.request import Generation, Status
from hpcinfer.runner.start import run_as_started
from tests.conftest import ROOT
from tests.mpi import rank_env
from tests.runs import JOB, LAYOUTS, run_command
from tests.slow_runs import SLOW, Start

NUM_ROWS = 120
TOO_LONG = range(5, NUM_ROWS, 6)
EMPTY = 60
SAMPLED = ["sampling.temperature=1.0", "sampling.seed=5", "sampling.ignore_eos=true", "sampling.max_tokens=8", "engine.max_context=48"]


def write_prompts(path: Path, num_rows: int = NUM_ROWS) -> Path:
    """Every sixth is longer than the context of 48 tokens; one is empty."""
    with PromptsWriter(path, kind="text") as writer:
        for row in range(num_rows):
            writer.append("" if row == EMPTY else f"{row}+{row}=".rjust(60 if row in TOO_LONG else 0, "7"))
    return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("parts") / "prompts.h5")


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def in_process(output: Path, prompts: Path, *settings: str):
    """A start of one rank, in this process."""
    return hpcinfer.run(JOB, [f"data.output={output}", f"data.prompts={prompts}", "parallel.tp=1", *SAMPLED, *settings])


def started(output: Path, prompts: Path, layout: str, *words: str) -> subprocess.CompletedProcess:
    command = [*run_command(output, [*LAYOUTS[layout], *SAMPLED, f"data.prompts={prompts}"]), *words]
    return subprocess.run(command, cwd=ROOT, env=rank_env(), capture_output=True, text=True, timeout=120, check=False)


def rows_of(path: Path) -> dict[int, Generation]:
    with GenerationFile(path) as file:
        found = list(file)
    assert len({generation.row for generation in found}) == len(found)
    return {generation.row: generation for generation in found}


def assert_equal(found: dict[int, Generation], expected: dict[int, Generation]) -> None:
    for row, generation in found.items():
        wanted = expected[row]
        assert (generation.status, generation.text, generation.error) == (wanted.status, wanted.text, wanted.error)
        assert generation.token_ids.tolist() == wanted.token_ids.tolist()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, prompts) -> dict[str, dict[int, Generation]]:
    """Policy -> outputs of a run in one piece."""
    torch.set_num_threads(1)  # the machine is shared
    folder, found = tmp_path_factory.mktemp("undisturbed"), {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(ROOT)
        for policy in ("error", "left", "right"):
            in_process(folder / policy, prompts, f"data.truncate={policy}")
            found[policy] = rows_of(folder / policy / "generations.h5")
    return found


def test_too_long_prompts_fail_or_are_cut(undisturbed):
    failed = {policy: {row for row, g in rows.items() if g.status is Status.FAILED} for policy, rows in undisturbed.items()}
    assert failed == {"error": {EMPTY, *TOO_LONG}, "left": {EMPTY}, "right": {EMPTY}}
    assert all("data.truncate" in undisturbed["error"][row].error for row in TOO_LONG)
    assert {undisturbed[policy][row].num_prompt_tokens for policy in ("left", "right") for row in TOO_LONG} == {48 - 8}
    whole = [row for row in range(NUM_ROWS) if row not in TOO_LONG]
    for policy in ("left", "right"):
        assert_equal({row: undisturbed[policy][row] for row in whole}, undisturbed["error"])
    assert any(undisturbed["left"][row].text != undisturbed["right"][row].text for row in TOO_LONG)


def test_a_trial_and_then_the_whole_run(tmp_path, prompts, undisturbed):
    job = tmp_path / "job.toml"
    job.write_text((ROOT / JOB).read_text().replace("runs/demo", str(tmp_path / "run")))
    command = [word.replace(JOB, str(job)) for word in run_command(tmp_path, [*LAYOUTS["tp2"], *SAMPLED, f"data.prompts={prompts}"])]
    del command[command.index("--set") : command.index("--set") + 2]  # data.output
    result = subprocess.run(
        [*command, "--limit", "20"], cwd=ROOT, env=rank_env(), capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    output = tmp_path / "run-trial"
    assert not (tmp_path / "run").exists() and not (output / "generations.h5").exists() and not (output / "done.json").exists()
    for words in ("20 of 120 rows", "for all 120 rows in this layout", "CPU-hours on 2 ranks"):
        assert words in result.stdout
    assert result.stdout.count(" -> ") == 5, "it shows some of its rows"
    trial = rows_of(output / "trial.h5")
    assert len(trial) == 20 and min(trial) < 40 and max(trial) > 80
    assert_equal(trial, undisturbed["error"])
    assert json.loads((output / "trial.json").read_text())["rows_in_all"] == NUM_ROWS

    again = in_process(output, prompts, "data.limit=20")
    assert again.generated_rows == 0 and again.is_done and not again.complete and again.trial["rows_ended"] == 0
    part = in_process(output, prompts, "data.rows=0:30")
    assert part.generated_rows == 30 - sum(row < 30 for row in trial) and not part.complete
    whole = started(output, prompts, "pp2", "--json")
    assert whole.returncode == 0, whole.stderr
    summary = json.loads(whole.stdout)
    assert summary["complete"] and summary["generated_rows"] == NUM_ROWS - len(trial) - part.generated_rows and not summary["trial"]
    assert_equal(rows_of(output / "generations.h5"), undisturbed["error"])
    with pytest.raises(ConfigError, match="no row"):
        in_process(output, prompts, "data.rows=120:")


def test_a_trial_of_the_last_rows_completes_the_run(tmp_path, prompts, undisturbed):
    assert not in_process(tmp_path / "run", prompts, "data.rows=:70").complete
    summary = in_process(tmp_path / "run", prompts, "data.rows=70:")
    assert summary.complete and summary.output.endswith("generations.h5")
    assert_equal(rows_of(tmp_path / "run/generations.h5"), undisturbed["error"])


@pytest.mark.timeout(200)
def test_failed_rows_are_tried_again_also_after_a_kill(tmp_path, prompts, undisturbed):
    output = tmp_path / "run"
    in_process(output, prompts)
    before = (output / "generations.h5").read_bytes()
    with pytest.raises(RunDirectoryError, match="--retry-failed"):
        in_process(output, prompts, "data.truncate=left")
    num_ok = read_status(output).num_done
    settings = [f"data.prompts={prompts}", "parallel.tp=1", *SAMPLED, *SLOW, "data.truncate=left"]
    with Start(output, 1, [*settings, "run.retry_failed=true"]) as retry:
        retry.wait_for(lambda status: status.num_done >= num_ok + 3)
        retry.signal(0, signal.SIGKILL)
        retry.process.wait(30)
    status = read_status(output)
    assert not status.complete and num_ok + 3 <= status.num_done < NUM_ROWS - 1 and status.retry_round == 1
    assert (output / "generations.h5").read_bytes() == before, "whole, until the new one takes its place"
    result = started(output, prompts, "tp2", "--set", "data.truncate=left", "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["complete"] and (summary["ok"], summary["failed"]) == (NUM_ROWS - 1, 1)
    assert summary["generated_rows"] <= NUM_ROWS - status.num_done, "nothing but failed rows is computed"
    found = rows_of(output / "generations.h5")
    assert_equal(found, undisturbed["left"])

    stamp = (output / "generations.h5").stat().st_mtime_ns
    assert in_process(output, prompts, "data.truncate=left").generated_rows == 0
    assert (output / "generations.h5").stat().st_mtime_ns == stamp
    assert in_process(output, prompts, "data.truncate=left", "run.retry_failed=true").generated_rows == 1, "the empty one, again"
    assert_equal(rows_of(output / "generations.h5"), undisturbed["left"])
    assert read_status(output).complete


def test_a_retry_without_failed_rows_has_nothing_to_do(tmp_path):
    """Also where it would cut too long prompts: there are none."""
    prompts, output = write_prompts(tmp_path / "prompts.h5", min(TOO_LONG)), tmp_path / "run"
    assert in_process(output, prompts).complete
    again = in_process(output, prompts, "data.truncate=left", "run.retry_failed=true")
    assert again.complete and again.generated_rows == 0
    with pytest.raises(RunDirectoryError, match="data.truncate"):
        in_process(output, prompts, "data.truncate=left")


def test_tasks_of_an_array_try_failed_rows_once(tmp_path, prompts, undisturbed):
    """Each with its own job id, the last one long after the others are done; and a task that Slurm starts again."""
    output = tmp_path / "run"
    in_process(output, prompts)
    settings = [f"data.output={output}", f"data.prompts={prompts}", "parallel.tp=1", *SAMPLED]
    settings += ["run.retry_failed=true", "data.truncate=left"]
    generated = []
    for job, restarts in ((41, 0), (42, 0), (41, 1)):
        task = {"SLURM_JOB_ID": str(job), "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "1", "SLURM_RESTART_COUNT": str(restarts)}
        environment = LaunchEnvironment({**task, "HPCINFER_END_TIME": "4000000000"})
        generated.append(run_as_started(JOB, settings, environment, Place(), DrainFlag(), quiet=True).generated_rows)
    assert generated == [len(TOO_LONG) + 1, 0, 0]
    assert_equal(rows_of(output / "generations.h5"), undisturbed["left"])


@pytest.mark.full
@pytest.mark.timeout(200)
@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2", "sp2"])
def test_a_trial_goes_on_after_a_kill_and_its_run_after_that(layout, tmp_path, prompts, undisturbed):
    output = tmp_path / "run"
    settings = [*LAYOUTS[layout], *SAMPLED, f"data.prompts={prompts}", "data.limit=40"]
    with Start(output, 2, [*settings, *SLOW]) as trial:
        trial.wait_for(lambda status: status.num_done >= 5)
        trial.signal(1, signal.SIGKILL)
        trial.process.wait(30)
    status = read_status(output)
    assert status.num_done < 33
    result = started(output, prompts, layout, "--limit", "40", "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["trial"]["is_done"] and summary["trial"]["rows"] == 40
    assert summary["generated_rows"] <= 40 - status.num_done - status.num_failed
    assert len(rows_of(output / "trial.h5")) == 40
    assert in_process(output, prompts).complete
    assert_equal(rows_of(output / "generations.h5"), undisturbed["error"])


def test_rows_appended_to_a_run_that_is_complete_and_merged(tmp_path, undisturbed):
    path, output = write_prompts(tmp_path / "prompts.h5", 50), tmp_path / "run"
    assert in_process(output, path).complete
    write_prompts(path, NUM_ROWS)
    assert in_process(output, path, "data.rows=50:60").generated_rows == 10
    result = started(output, path, "pp2", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["generated_rows"] == NUM_ROWS - 60
    assert_equal(rows_of(output / "generations.h5"), undisturbed["error"])
    assert len(rows_of(output / "generations.h5")) == NUM_ROWS and read_status(output).complete
