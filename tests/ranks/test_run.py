"""`hpcinfer run` as users meet it: errors before anything is loaded, bad rows, resuming, other inputs, the Python call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import hpcinfer
from hpcinfer.data.generations import GenerationFile
from hpcinfer.data.prompts.prompts_writer import PromptsWriter
from hpcinfer.errors import ConfigError
from hpcinfer.request import Status
from tests.conftest import ROOT
from tests.mpi import rank_env, run_ranks
from tests.runs import JOB


def run(output: Path, *settings: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hpcinfer", "run", JOB, "--set", f"data.output={output}", *options]
    command += [word for setting in settings for word in ("--set", setting)]
    return subprocess.run(command, cwd=ROOT, env=rank_env(), capture_output=True, text=True, timeout=120, check=False)


def write_prompts(path: Path, prompts, overrides=None) -> Path:
    with PromptsWriter(path, kind="text" if isinstance(prompts[0], (str, bytes)) else "token_ids") as writer:
        for row, prompt in enumerate(prompts):
            writer.append(prompt, overrides=(overrides or {}).get(row))
    return path


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["parallel.tp=3"], ["4 query heads", "2"]),
        (["parallel.tp=1", "parallel.pp=5"], ["4 layers", "parallel.pp = 4"]),
        (["parallel.tq=2"], ["did you mean tp"]),
        (["engine.max_context=5000"], ["512"]),
        (["engine.kv_memory=10 B"], ["no memory for the keys and values"]),
        (["engine.attention=FAST"], ["SDPA", "NAIVE"]),
        (["model.path=absent"], ["no model folder"]),
        (["data.prompts=absent.h5"], ["absent.h5"]),
        (["data.prompts=datasets/demo/prompts.jsonl"], ["prompts.jsonl"]),
        (["data.dataset=nothing"], ["nothing"]),
        (["sampling.logit_bias={ 5000 = 1 }"], ["token id 5000", "vocabulary of 263", "[sampling]"]),
    ],
)
def test_a_misfit_is_one_report_and_nothing_is_made(settings, words, tmp_path):
    result = run(tmp_path / "run", "run.linger_s=0", *settings)
    assert result.returncode in (1, 2), result.stderr
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("Error:") + result.stderr.count("hpcinfer: ") <= 2, result.stderr
    assert not (tmp_path / "run" / "segments").exists() or not os.listdir(tmp_path / "run" / "segments")


def test_under_mpiexec_with_the_wrong_number_of_ranks(tmp_path):
    result = run_ranks(3, ["-m", "hpcinfer", "run", JOB, "--set", f"data.output={tmp_path / 'run'}"], timeout_s=60)
    assert result.returncode == 2
    assert "3 ranks" in result.stderr and "2 or 4" in result.stderr
    assert result.stderr.count("ConfigError") == 1


def test_usage_errors_are_printed_once_whatever_the_ranks(tmp_path):
    result = run_ranks(3, ["-m", "hpcinfer", "run", "--sett", "x"], timeout_s=60)
    assert result.returncode == 2 and result.stderr.count("hpcinfer:") == 1


def test_bad_rows_fail_alone_and_are_counted(tmp_path):
    prompts = [b"1+1=", b"2+2=", b"x" * 600, b"\xff\xfe", b"", b"3+3=", b"4+4="]
    path = tmp_path / "prompts.h5"
    with h5py.File(path, "w") as file:  # bare data and offsets are valid prompts; our own writer would refuse row 3
        file["prompts/data"] = np.frombuffer(b"".join(prompts), np.uint8)
        file["prompts/offsets"] = np.cumsum([0, *map(len, prompts)])
    result = run(tmp_path / "run", f"data.prompts={path}", options=("--json",))
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert (summary["ok"], summary["failed"], summary["complete"]) == (4, 3, True)
    assert sum(summary["failures"].values()) == 3 and len(summary["failures"]) == 3
    with GenerationFile(tmp_path / "run/generations.h5") as file:
        rows = list(file)
    assert [r.row for r in rows if r.status is Status.FAILED] == [2, 3, 4]
    assert all(r.error for r in rows if r.status is Status.FAILED)
    assert [r.text for r in rows if r.status is Status.OK] == ["2", "4", "6", "8"]


@pytest.mark.parametrize(("allowed", "code"), [("2", 1), ("10%", 1), ("3", 0), ("100%", 0)])
def test_too_many_failed_rows_end_the_run_with_1(allowed, code, tmp_path):
    path = write_prompts(tmp_path / "prompts.h5", ["1+1=", "", "", "", "2+2="])
    result = run(tmp_path / "run", f"data.prompts={path}", "parallel.tp=1", f"run.max_failed={allowed}")
    assert result.returncode == code, result.stderr
    if code:
        assert "run.max_failed" in result.stderr and "Traceback" not in result.stderr
        again = run(tmp_path / "run", f"data.prompts={path}", "parallel.tp=1", options=("--max-failed", "100%"))
        assert again.returncode == 0, again.stderr


def test_token_ids_and_rows_of_their_own_sampling(tmp_path):
    prompts = [list(b"1+1="), list(b"reverse abc:"), [5, 262], [5, 263]]
    path = write_prompts(tmp_path / "prompts.h5", prompts, {1: {"max_tokens": 2}})
    result = run(tmp_path / "run", f"data.prompts={path}")
    assert result.returncode == 0, result.stderr
    with GenerationFile(tmp_path / "run/generations.h5") as file:
        rows = list(file)
    assert rows[0].text == "2" and rows[1].text == " c"
    assert rows[2].status is Status.OK
    assert "vocabulary of 263" in rows[3].error


def test_a_finished_run_is_not_computed_again_and_another_job_is_refused(tmp_path):
    path = write_prompts(tmp_path / "prompts.h5", ["1+1=", "2+2="])
    assert run(tmp_path / "run", f"data.prompts={path}").returncode == 0
    before = (tmp_path / "run/generations.h5").stat().st_mtime_ns
    again = run(tmp_path / "run", f"data.prompts={path}", "parallel.tp=1", options=("--json",))
    assert again.returncode == 0 and json.loads(again.stdout)["generated_rows"] == 0
    assert (tmp_path / "run/generations.h5").stat().st_mtime_ns == before
    for setting, word in (("sampling.temperature=1.0", "temperature"), ("model.dtype=bfloat16", "dtype"), ("sampling.n=2", "sampling.n")):
        other = run(tmp_path / "run", f"data.prompts={path}", setting)
        assert other.returncode == 1 and word in other.stderr, other.stderr
    other = run(tmp_path / "run")
    assert other.returncode == 1 and "input" in other.stderr


@pytest.mark.parametrize("tp", [1, 2])
def test_the_python_call_returns_a_summary(tmp_path, tp, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = write_prompts(tmp_path / "prompts.h5", ["1+1=", "2+2="])
    summary = hpcinfer.run(JOB, [f"data.output={tmp_path / 'run'}", f"data.prompts={path}", f"parallel.tp={tp}"])
    assert summary.complete and summary.ok == 2 and summary.output == str(tmp_path / "run/generations.h5")
    with pytest.raises(ConfigError):
        hpcinfer.run(JOB, ["parallel.nothing=1"])


def test_paths_with_spaces_quotes_and_newlines(tmp_path):
    folder = tmp_path / "it's \"odd\"\n folder"
    folder.mkdir()
    path = write_prompts(folder / "my prompts.h5", ["1+1="])
    monkey = json.dumps(str(path)), json.dumps(str(folder / "the run"))
    command = [sys.executable, "-m", "hpcinfer", "run", JOB, "--set", f"data.prompts={monkey[0]}", "--set", f"data.output={monkey[1]}"]
    result = subprocess.run(command, cwd=ROOT, env=rank_env(), capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert (folder / "the run/generations.h5").exists()


def test_too_little_memory_for_a_row_is_an_error_of_the_start_and_not_of_the_row(tmp_path):
    path = write_prompts(tmp_path / "prompts.h5", ["1+1=", "reverse abcdefgh:", "2+2="])
    small = run(tmp_path / "run", f"data.prompts={path}", "parallel.tp=1", "engine.kv_memory=40 KiB")
    assert small.returncode == 2 and "K/V cache holds" in small.stderr and "Traceback" not in small.stderr
    large = run(tmp_path / "run", f"data.prompts={path}", "parallel.tp=1", options=("--json",))
    assert large.returncode == 0 and json.loads(large.stdout)["ok"] == 3


def test_many_rows_that_cannot_run_do_not_hold_up_the_loop(tmp_path):
    path = write_prompts(tmp_path / "prompts.h5", [""] * 3000 + ["1+1="])
    result = run(tmp_path / "run", f"data.prompts={path}", "parallel.tp=1", "run.max_failed=10")
    assert result.returncode == 1 and "run.max_failed allows 10" in result.stderr
    status = json.loads(
        subprocess.run(
            [sys.executable, "-m", "hpcinfer", "status", str(tmp_path / "run"), "--json"], cwd=ROOT, env=rank_env(),
            capture_output=True, text=True, check=False,
        ).stdout
    )
    assert 10 < status["num_failed"] < 1000
    assert status["writers"][0]["state"] == "left"
    again = run(tmp_path / "run", f"data.prompts={path}", "parallel.tp=1", "run.max_failed=10")
    assert again.returncode == 1 and "run.max_failed allows 10" in again.stderr and "Traceback" not in again.stderr


def test_a_console_and_a_log_that_cannot_be_written_end_nothing(tmp_path):
    path = write_prompts(tmp_path / "prompts.h5", ["1+1=", "2+2="])
    assert run(tmp_path / "run", f"data.prompts={path}", "parallel.tp=1", "sampling.max_tokens=1").returncode == 0
    command = [sys.executable, "-m", "hpcinfer", "run", JOB]
    for setting in (f"data.output={tmp_path / 'other'}", f"data.prompts={path}", "parallel.tp=1"):
        command += ["--set", setting]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, cwd=ROOT, env=rank_env(), stdout=full, stderr=full, timeout=120, check=False)
    assert result.returncode == 0
    assert (tmp_path / "other/generations.h5").exists()


def test_the_python_call_under_mpiexec_ends_all_ranks_when_one_fails(tmp_path):
    path = write_prompts(tmp_path / "prompts.h5", ["", "", "", "1+1="])
    script = tmp_path / "script.py"
    script.write_text("import sys, hpcinfer\nhpcinfer.run(sys.argv[1], sys.argv[2:])\n")
    settings = [f"data.output={tmp_path / 'run'}", f"data.prompts={path}", "run.max_failed=1"]
    result = run_ranks(2, [script, JOB, *settings], timeout_s=60)
    assert result.returncode == 1 and "run.max_failed allows 1" in result.stderr
