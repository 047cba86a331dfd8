"""`hpcinfer run` of jobs that score and embed: what comes out, for good rows and bad ones, and how it is shown."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from hpcinfer.data.export import ExportOptions, export_jsonl
from hpcinfer.data.generations import GenerationFile
from hpcinfer.data.prompts.prompts_writer import PromptsWriter
from hpcinfer.request import Generation, Status
from tests.checkpoints import load_reference
from tests.conftest import ROOT
from tests.mpi import rank_env
from tests.runs import JOB

MODEL = ROOT / "datasets/demo-model"
ROWS = [("17+25=", "42"), ("17+25=", "43"), ("sort 7 3 9 1:", " 1 3 7 9"), ("1+1=", None), ("x" * 600, "y"), ("reverse abc:", " cba")]
BAD = [3, 4]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.h5"
    with PromptsWriter(path, kind="text") as writer:
        for prompt, answer in ROWS:
            writer.append(prompt, meta={} if answer is None else {"answer": answer})
    return path


@pytest.fixture(scope="module")
def reference():
    return load_reference(MODEL)


def run(output: Path, prompts: Path, *settings: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hpcinfer", "run", JOB, *options]
    for setting in (f"data.output={output}", f"data.prompts={prompts}", "model.dtype=float32", *settings):
        command += ["--set", setting]
    result = subprocess.run(command, cwd=ROOT, env=rank_env(), capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result


def read(output: Path) -> list[Generation]:
    with GenerationFile(output / "generations.h5") as file:
        return list(file)


def token_ids(text: str) -> torch.Tensor:
    from hpcinfer.data.tokenize import Tokenizer

    return torch.tensor([Tokenizer(MODEL).encode(text).tolist()])


def test_score_continuations(prompts, reference, tmp_path):
    settings = ("task.kind=score", "task.continuation=answer", "parallel.tp=1", "sampling.prompt_logprobs=1")
    summary = json.loads(run(tmp_path / "run", prompts, *settings, options=("--json",)).stdout)
    assert (summary["task"], summary["ok"], summary["failed"], summary["output_tokens"]) == ("score", 4, 2, 0)
    rows = read(tmp_path / "run")
    assert [row.row for row in rows if row.status is Status.FAILED] == BAD
    assert "no continuation" in rows[3].error and "512" in rows[4].error
    for row, (prompt, answer) in zip(rows, ROWS, strict=True):
        if row.row in BAD:
            assert row.score is None
            continue
        ids, first = token_ids(prompt + answer), token_ids(prompt).shape[1]
        with torch.no_grad():
            expected = torch.log_softmax(reference(ids).logits[0].double(), dim=-1)[range(ids.shape[1] - 1), ids[0, 1:]].numpy()
        assert row.score.num_tokens == len(expected) - first + 1 and len(row.token_ids) == 0
        np.testing.assert_allclose(row.score.logprob, expected[first - 1 :].sum(), atol=1e-3)
        np.testing.assert_allclose(row.prompt_logprobs.chosen[1:], expected, atol=1e-3)
    assert rows[0].score.logprob > rows[1].score.logprob + 1, "the right answer is the likelier one"
    # The run's own prompts, continuations included, are the ones that a join accepts.
    export_jsonl(tmp_path / "run", tmp_path / "rows.jsonl", ExportOptions(ids=True))
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert lines[0]["perplexity"] == rows[0].score.perplexity and lines[3]["score"] is None


def test_embed_on_two_stages(prompts, reference, tmp_path):
    settings = ("task.kind=embed", "task.pooling=mean", "parallel.pp=2", "parallel.tp=1", "engine.max_batch_tokens=5")
    result = run(tmp_path / "run", prompts, *settings)
    assert "nothing is generated: task embed" in result.stdout and "prompt tokens/s" in result.stdout
    rows = read(tmp_path / "run")
    assert [row.row for row in rows if row.status is Status.FAILED] == [4]
    with h5py.File(tmp_path / "run/generations.h5") as file:
        group = file["generations"]
        matrix = group["embedding"][:].reshape(len(ROWS) - 1, -1)
        assert np.diff(group["embedding_offsets"][:]).tolist() == [matrix.shape[1]] * 4 + [0, matrix.shape[1]]
    for vector, (prompt, _) in zip(matrix, ROWS[:4] + ROWS[5:], strict=True):
        with torch.no_grad():
            hidden = reference(token_ids(prompt), output_hidden_states=True).hidden_states[-1][0].mean(dim=0)
        np.testing.assert_allclose(vector, (hidden / hidden.norm()).numpy(), atol=1e-4)
