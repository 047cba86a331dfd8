"""Several MPI ranks on one GPU over NCCL: the layouts agree with one rank, and a dead rank ends the job in its deadline."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from tests.checkpoints import make_checkpoint
from tests.conftest import ROOT
from tests.mpi import kill_tree, rank_env
from tests.runs import assert_same, family, read_outputs, run_command, run_demo

pytest.importorskip("cupy", reason="NCCL through CuPy: pip install '.[cuda13]'")
GPU = ["engine.device=cuda", "comm.share_gpu=true", "model.dtype=float32", "engine.max_sequences=16", "engine.kv_memory=64 MiB"]
LAYOUTS = {
    "tp2": ["parallel.tp=2"],
    "pp2": ["parallel.tp=1", "parallel.pp=2"],
    "tp2, no graphs": ["parallel.tp=2", "engine.graphs=off"],
    "tp2, two-batch": ["parallel.tp=2", "parallel.two_batch=8"],
}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    output = tmp_path_factory.mktemp("one") / "run"
    run_demo(output, ["parallel.tp=1", *GPU])
    return read_outputs(output)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_agree_with_one(layout, one_rank, tmp_path):
    run_demo(tmp_path / "run", [*LAYOUTS[layout], *GPU], timeout_s=500)
    assert_same(read_outputs(tmp_path / "run"), one_rank)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", [["parallel.tp=2", "parallel.ep=2"], ["parallel.tp=1", "parallel.sp=2", "parallel.ep=2", "parallel.sp_min_tokens=8"]], ids=str)
def test_experts_over_two_ranks_agree_with_one(layout, tmp_path):
    # Random weights this large keep the logits far apart.
    model = make_checkpoint(tmp_path / "model", "mixtral", vocab_size=263, hidden_size=32, tokenizer=True)
    job = [f"model.path={model}", "sampling.max_tokens=8", *GPU]
    run_demo(tmp_path / "one", ["parallel.tp=1", *job], timeout_s=500)
    run_demo(tmp_path / "two", [*layout, *job], timeout_s=500)
    assert_same(read_outputs(tmp_path / "two"), read_outputs(tmp_path / "one"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_rank_ends_the_job(fault, tmp_path):
    deadline_s = 10
    command = run_command(tmp_path / "run", ["parallel.tp=2", *GPU, f"comm.deadline_s={deadline_s}", "run.segment_s=0.2"])
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=rank_env(), stdout=log, stderr=log, start_new_session=True)
    try:
        until = time.monotonic() + 200
        while not list((tmp_path / "run" / "segments").glob("seg-*.h5")):
            assert process.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()
            time.sleep(0.1)
        ranks = family(process.pid)["rank"]
        began = time.monotonic()
        os.kill(ranks[1], fault)
        code = process.wait(timeout=2 * deadline_s + 60)
        assert code != 0 and time.monotonic() - began < 2 * deadline_s + 15, (tmp_path / "log").read_text()
    finally:
        kill_tree(process.pid)
