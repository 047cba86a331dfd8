"""`hpcinfer attention`: the matrix of this machine, of GPUs that are not here, and of one that pretends to be."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from hpcinfer.attention import matrix, registry
from hpcinfer.attention.flex import FlexBackend
from hpcinfer.attention.triton_backend import TritonBackend
from hpcinfer.cli import attention
from hpcinfer.cli import main as cli
from hpcinfer.config.job import ModelSection
from hpcinfer.config.parallel import ParallelConfig
from tests.checkpoints import make_checkpoint


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """No GPU and no optional package, whatever this machine has."""
    monkeypatch.delenv(registry.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(registry, "installed_packages", frozenset)


@pytest.fixture
def hopper(monkeypatch):
    """An H100 with triton alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(registry, "installed_packages", lambda: frozenset({"triton"}))
    for backend in (TritonBackend, FlexBackend):
        monkeypatch.setattr(backend, "prepare", lambda self, query: None)


def run(capsys, *arguments) -> dict:
    assert cli.main(["attention", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_defaults_are_those_of_the_dataclasses():
    parser = argparse.ArgumentParser()
    attention.configure(parser)
    args = parser.parse_args([])
    assert (args.dtype, args.tp) == (ModelSection(path="x").dtype, ParallelConfig().tp)


def test_a_machine_without_a_gpu(capsys):
    shown = run(capsys)
    assert shown["device"] == "cpu" and shown["block_size"] == 16 and shown["dtype"] == "bfloat16"
    assert [(row["name"], row["used"], row["refused"]) for row in shown["backends"]] == [
        ("FLASH_ATTN", False, "needs an NVIDIA GPU"), ("TRITON", False, "needs an NVIDIA GPU"),
        ("FLASHINFER", False, "needs an NVIDIA GPU"), ("FLEX_ATTENTION", False, None), ("SDPA", True, None),
        ("NAIVE", False, None),
    ]  # fmt: skip
    assert [(row["capability"], row["backend"], row["block_size"], row["plain"]) for row in shown["gpus"]] == [
        ("8.0", "FLASH_ATTN", 256, "TRITON"), ("8.9", "FLASH_ATTN", 256, "TRITON"), ("9.0", "FLASH_ATTN", 128, "TRITON"),
        ("10.0", "TRITON", 64, "TRITON"),
    ]  # fmt: skip
    assert "pip install flash-attn" in shown["gpus"][0]["missing"] and "hopper" in shown["gpus"][2]["missing"]
    assert set(shown["not_supported"]) == {"AMD/ROCm", "FP8 K/V", "MLA"}


def test_the_table_says_the_same(capsys):
    assert cli.main(["attention"]) == 0
    shown = capsys.readouterr().out
    for name in registry.BACKENDS:
        assert f"\n{name:<15} " in shown
    assert "SDPA            used, with pages of 16 tokens" in shown
    assert " 9.0 H100, H200       FLASH_ATTN, pages of 128 tokens; with torch alone TRITON: flash_attn_interface" in shown
    for name in matrix.NOT_SUPPORTED:
        assert f"\n{name:<15} " in shown


def test_a_gpu(capsys, hopper):
    shown = run(capsys)
    assert (shown["device"], shown["capability"], shown["cuda"], shown["gpus"]) == ("NVIDIA H100", "9.0", "13.0", [])
    used = {row["name"]: row for row in shown["backends"]}
    assert used["TRITON"]["used"] and used["TRITON"]["capturable"] and shown["block_size"] == 64
    assert "pip install" in used["FLASH_ATTN"]["refused"] and used["FLASHINFER"]["refused"]


def test_a_model(capsys, tmp_path):
    make_checkpoint(tmp_path, "mistral")
    shown = run(capsys, "--model", str(tmp_path), "--tp", "2", "--dtype", "float16")
    assert shown["sliding_window"] and shown["dtype"] == "float16" and shown["model"] == str(tmp_path)
    whole = run(capsys, "--model", str(tmp_path))
    assert shown["num_heads"] == whole["num_heads"] // 2


def test_an_environment_variable_that_cannot_be_followed(capsys, monkeypatch):
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "triton")
    assert cli.main(["attention"]) == 2
    shown = capsys.readouterr().out
    assert "HPCINFER_ATTENTION_BACKEND = 'triton' cannot compute" in shown and "used, with" not in shown
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "NAIVE")
    assert [row["name"] for row in run(capsys)["backends"] if row["used"]] == ["NAIVE"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--tp", "0"], "--tp 0"), (["--tp", "3"], "nearest valid tp"), (["--dtype", "int8"], "int8"), (["--rows"], "--rows")],
)
def test_usage_errors(capsys, arguments, words):
    assert cli.main(["attention", *arguments]) == 2
    shown = capsys.readouterr()
    assert words in shown.err and "Traceback" not in shown.err and not shown.out


def test_no_such_model(capsys):
    assert cli.main(["attention", "--model", "none"]) == 1
    assert "no model folder 'none'" in capsys.readouterr().err
