"""Loading on real ranks: every byte from the file system once in the world, counted by the operating system too."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hpcinfer.data.prompts.prompts_writer import PromptsWriter
from tests.checkpoints import make_checkpoint
from tests.conftest import ROOT
from tests.mpi import rank_env, run_ranks
from tests.ranks.loading_rank import EXTENT_BYTES, LAYOUTS
from tests.runs import LAYOUTS as RUN_LAYOUTS
from tests.runs import run_command

# Read by a rank beside the checkpoint's data: headers and index by rank 0, modules, /proc, what MPI reads.
OTHER_BYTES = 64 * 1024
TWO_NODES = {"MPIR_CVAR_ODD_EVEN_CLIQUES": "1"}
"""MPICH then takes even and odd ranks of one host for two nodes."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Tied, 5 MB in several shards."""
    return make_checkpoint(
        tmp_path_factory.mktemp("checkpoint"), max_shard_size="1MB", tie_word_embeddings=True, hidden_size=128,
        intermediate_size=500, vocab_size=1999, num_hidden_layers=4,
    )


def data_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())
    return total


def add_a_head(folder: Path) -> None:
    """A tied checkpoint that repeats the embedding, 1 MB, in a shard of its own."""
    save_file({"lm_head.weight": torch.ones(1999, 128)}, folder / "model-head.safetensors")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = "model-head.safetensors"
    index.write_text(json.dumps(content))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("num_nodes", [1, 2])
def test_each_byte_is_read_once_in_the_world(checkpoint, tmp_path, num_nodes):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    needed = data_bytes(folder)
    add_a_head(folder)
    assert needed > 3e6 > 20 * EXTENT_BYTES and len(list(folder.glob("*.safetensors"))) > 4
    run_ranks(
        4, ["-m", "tests.ranks.loading_rank", folder, tmp_path], timeout_s=90, env=TWO_NODES if num_nodes == 2 else {}
    ).check()
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    for name in LAYOUTS:
        cases = [rank[name] for rank in ranks]
        assert {case["num_nodes"] for case in cases} == {num_nodes}
        readers = [case for case in cases if case["is_reader"]]
        assert len(readers) == num_nodes
        assert sum(case["preadv_bytes"] for case in cases) == needed
        assert all(case["preadv_bytes"] == case["read_bytes"] for case in cases)
        assert all(case["done_bytes"] == case["total_bytes"] == needed for case in cases)
        for case in cases:
            assert case["preadv_bytes"] <= case["characters_read"] <= case["preadv_bytes"] + OTHER_BYTES
            if case["is_reader"]:
                assert abs(case["preadv_bytes"] - needed / num_nodes) <= EXTENT_BYTES
            else:
                assert case["preadv_bytes"] == 0
    check_failures(ranks, num_extents=needed / EXTENT_BYTES)


def check_failures(ranks: list[dict], num_extents: float) -> None:
    """One error for all, within seconds."""
    words = {
        "broken disk": "Input/output error", "refused": "rank 3 refuses", "removed": "No such file",
        "truncated": "has become shorter",
    }
    for name, text in words.items():
        cases = [rank[name] for rank in ranks]
        assert len({case["error"] for case in cases}) == 1 and all(text in case["error"] for case in cases), cases
        assert all(case["agreed"] and case["seconds"] < 20 for case in cases)
        taken = sorted(case["extents"] for case in cases if name != "refused")
        assert not taken or taken[-1] - taken[0] <= 1, "all stop at one extent, of which its sender knew before"
    assert all(rank["broken disk"]["extents"] <= 1 for rank in ranks)
    for name in ("removed", "truncated"):
        assert all(0 < rank[name]["extents"] < num_extents - 5 for rank in ranks)


@pytest.mark.timeout(120)
def test_a_run_says_what_it_read(tmp_path):
    with PromptsWriter(tmp_path / "prompts.h5", kind="text") as writer:
        for prompt in ("1+1=", "2+2=", "3+3="):
            writer.append(prompt)
    settings = [*RUN_LAYOUTS["dp2 x tp2"], f"data.prompts={tmp_path / 'prompts.h5'}"]
    command = [*run_command(tmp_path / "run", settings), "--json"]
    result = subprocess.run(command, cwd=ROOT, env=rank_env(), capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr
    needed = data_bytes(ROOT / "datasets/demo-model")
    assert json.loads(result.stdout)["weights_read_bytes"] == needed
    log = next((tmp_path / "run/logs").glob("*-rank0.log")).read_text()
    assert f"weights of {needed / 1e9:.3f} GB, " in log and "GB/s)" in log, log
