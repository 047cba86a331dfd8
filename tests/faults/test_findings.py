"""Log-probabilities, scores and embeddings of runs that are drained or killed in their middle: those of an undisturbed run."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from hpcinfer.data.generations import GenerationFile
from hpcinfer.data.ledger.status import read_status
from hpcinfer.request import Generation, Status
from tests.mpi import kill_tree
from tests.runs import LAYOUTS, run_demo
from tests.slow_runs import SLOW, Start, has_committed, write_job

NUM_ROWS = 40
ASKED = ["sampling.logprobs=2", "sampling.prompt_logprobs=1"]
FLOAT = ["model.dtype=float32"]


def rows_of(output: Path) -> list[Generation]:
    with GenerationFile(output / "generations.h5") as file:
        rows = list(file)
    assert [row.row for row in rows] == list(range(NUM_ROWS)) and all(row.status is Status.OK for row in rows)
    return rows


def assert_same(rows: list[Generation], undisturbed: list[Generation]) -> None:
    for one, other in zip(rows, undisturbed, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        for name in ("logprobs", "prompt_logprobs"):
            a, b = getattr(one, name), getattr(other, name)
            assert (a is None) == (b is None)
            if a is not None:
                np.testing.assert_allclose(a.chosen, b.chosen, atol=1e-3)
                np.testing.assert_allclose(a.top, b.top, atol=1e-3)
        if one.score is not None:
            assert one.score.num_tokens == other.score.num_tokens and abs(one.score.logprob - other.score.logprob) < 1e-2
        if one.embedding is not None:
            np.testing.assert_allclose(one.embedding, other.embedding, atol=1e-4)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "layouts", [("tp2", "tp1"), *(pytest.param(pair, marks=pytest.mark.full) for pair in (("pp2", "tp2"), ("sp2", "pp2"), ("tp1", "sp2")))],
    ids=" then ".join,
)
def test_partial_rows_keep_their_log_probabilities(layouts, tmp_path):
    job = [*write_job(tmp_path, NUM_ROWS, max_tokens=lambda row: 25 + row % 20), *ASKED, *FLOAT]
    run_demo(tmp_path / "undisturbed", [*job, "parallel.tp=1"])
    undisturbed = rows_of(tmp_path / "undisturbed")
    assert all(len(row.logprobs) == len(row.token_ids) and len(row.prompt_logprobs) == row.num_prompt_tokens for row in undisturbed)
    output, first = tmp_path / "run", LAYOUTS[layouts[0]]
    with Start(output, 1 if layouts[0] == "tp1" else 2, [*job, *first, *SLOW, "run.drain_s=0.1"]) as start:
        start.wait_for(has_committed(8))
        start.signal(0)
        assert start.wait() == 3, start.text
    status = read_status(output, exact=True)
    assert status.num_partial > 0
    segments = [GenerationFile(path) for path in sorted(output.glob("segments/*.h5"))]
    partial = [row for file in segments for row in file if row.status is Status.PARTIAL]
    assert partial and all(len(row.logprobs) == len(row.token_ids) > 0 for row in partial)
    run_demo(output, [*job, *LAYOUTS[layouts[1]]])
    assert_same(rows_of(output), undisturbed)


@pytest.mark.full
@pytest.mark.timeout(240)
@pytest.mark.parametrize("task", ["task.kind=score", "task.kind=embed"])
@pytest.mark.parametrize("layouts", [("tp2", "pp2"), ("sp2", "tp1")], ids=" then ".join)
def test_a_killed_run_goes_on(task, layouts, tmp_path):
    job = [*write_job(tmp_path, NUM_ROWS, max_tokens=lambda row: 1), task, "task.pooling=mean", *FLOAT]
    run_demo(tmp_path / "undisturbed", [*job, "parallel.tp=1"])
    output = tmp_path / "run"
    with Start(output, 2, [*job, *LAYOUTS[layouts[0]], *SLOW, "run.segment_rows=2"]) as start:
        start.wait_for(has_committed(4))
        start.signal(1, signal.SIGKILL)
        kill_tree(start.process.pid)
    status = read_status(output, exact=True)
    assert 4 <= status.num_done < NUM_ROWS and status.num_partial == 0
    run_demo(output, [*job, *LAYOUTS[layouts[1]]])
    assert_same(rows_of(output), rows_of(tmp_path / "undisturbed"))
