"""A device runs out of memory in the middle of a run: the life ends resumable, the next ones take less and finish."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from hpcinfer.data.ledger.budgets import LESS
from hpcinfer.data.ledger.status import read_status
from tests.conftest import ROOT
from tests.mpi import world_command, world_env
from tests.runs import JOB, assert_same, read_outputs, run_demo

BLOCKS, SIZE = 60, 16
LIMIT = int(BLOCKS * SIZE * 0.8)
"""K/V tokens that the device really has room for: less than after the first reduction."""


def start(output: Path, victim: int, tick: int) -> subprocess.CompletedProcess:
    argv = ["-m", "tests.faults.out_of_memory_rank", str(victim), str(tick), str(LIMIT), "run", JOB]
    kv_bytes = BLOCKS * SIZE * token_bytes()
    for setting in (
        f"data.output={output}", "parallel.tp=1", "parallel.pp=2", f"engine.kv_memory={kv_bytes} B", "run.segment_s=0.1",
        "engine.max_sequences=16",
    ):
        argv += ["--set", setting]
    command = world_command(2, argv)
    return subprocess.run(
        command, cwd=ROOT, env=world_env(2, None, command[0]), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=120, check=False,
    )


def token_bytes() -> int:
    """Of the demo model's larger stage."""
    from hpcinfer.config.model import ModelConfig
    from hpcinfer.models.footprint import kv_bytes_per_token

    model = ModelConfig.from_folder(ROOT / "datasets/demo-model")
    return kv_bytes_per_token(model, -(-model.num_layers // 2), 1, 4)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.full)])
def test_the_next_lives_take_less_and_finish(victim, tmp_path):
    run_demo(tmp_path / "undisturbed", ["parallel.tp=1"])
    output, allowed, seen = tmp_path / "run", None, []
    for life in range(6):
        result = start(output, victim, tick=100)
        if result.returncode == 0:
            break
        assert result.returncode == 3, result.stdout + result.stderr
        assert "out of memory" in result.stderr and "planted" in result.stderr, result.stderr
        budgets = [json.loads(path.read_text()) for path in (output / "budgets").glob("*.json")]
        assert len(budgets) == life + 1
        newest = min(budgets, key=lambda budget: budget["kv_tokens"])
        assert newest["kv_tokens"] == int(newest["ran_out_with"] * LESS) and f"rank {victim}" in newest["place"]
        assert allowed is None or newest["ran_out_with"] <= allowed
        allowed = newest["kv_tokens"]
        seen.append(read_status(output, exact=True).num_done)
    assert result.returncode == 0 and life == 2, f"life {life}\n{result.stderr}"
    assert seen[0] > 0, "rows of the first life are kept"
    assert_same(read_outputs(output), read_outputs(tmp_path / "undisturbed"))


def test_a_budget_counts_for_its_layout_alone(tmp_path):
    from hpcinfer.data.ledger.budgets import read_budget, record_budget
    from hpcinfer.data.ledger.run_directory import RunIdentity, create_or_open

    run = create_or_open(tmp_path / "run", RunIdentity(input_fingerprint="x", num_rows=3, model={}, sampling={}))
    assert read_budget(run, layout="pp 1") is None
    assert record_budget(run, layout="pp 1", num_tokens=1000, place="rank 0") == 850
    assert record_budget(run, layout="pp 1", num_tokens=850, place="rank 0") == 722
    (run.path / "budgets" / "0-torn.json").write_text('{"layout": "pp 1", "kv_to')
    assert read_budget(run, layout="pp 1") == 722
    assert read_budget(run, layout="pp 2") is None
