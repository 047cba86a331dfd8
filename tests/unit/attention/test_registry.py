"""The choice of a backend: the matrix, and what is said when one cannot be had."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import types

import pytest
import torch

from hpcinfer.attention.base import AttentionQuery
from hpcinfer.attention.flex import FlexBackend
from hpcinfer.attention.registry import (
    AUTOMATIC, BACKENDS, PACKAGES, attention_query, explain_backends, installed_packages, select_backend,
)  # fmt: skip
from hpcinfer.attention.triton_backend import TritonBackend
from hpcinfer.config.model import ModelConfig
from hpcinfer.errors import ConfigError
from tests.conftest import ROOT
from tests.contract.flash_attn_stand_in import flash_attn, flash_attn_interface

QUERY = AttentionQuery(
    device_type="cpu", dtype=torch.float32, head_dim=64, num_heads=8, num_kv_heads=2, sliding_window=True
)
EVERYTHING = frozenset({*PACKAGES, "nvcc"})
GPU = AttentionQuery(
    device_type="cuda", capability=(9, 0), cuda_version=(12, 8), packages=EVERYTHING, dtype=torch.bfloat16, head_dim=128,
    num_heads=8, num_kv_heads=2,
)


@pytest.fixture(autouse=True)
def without_triton(monkeypatch):
    """What needs Triton or torch's compiler is not imported here: other tests of this process interpret kernels."""
    for backend in (TritonBackend, FlexBackend):
        monkeypatch.setattr(backend, "prepare", lambda self, query: None)


@pytest.fixture
def libraries(monkeypatch):
    """Both flash-attention libraries can be imported."""
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn("2.8.3"))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", flash_attn_interface())


def test_automatic_choice_on_a_cpu_is_sdpa():
    for setting in ("", "auto"):
        choice = select_backend(QUERY, setting=setting)
        assert (choice.backend.name, choice.block_size, choice.passed_over) == ("SDPA", 16, {})


def test_setting_beats_environment_beats_automatic():
    assert select_backend(QUERY, environment="naive").backend.name == "NAIVE"
    assert select_backend(QUERY, setting="sdpa", environment="NAIVE").backend.name == "SDPA"
    assert select_backend(QUERY, setting="auto", environment="flex_attention").backend.name == "FLEX_ATTENTION"


@pytest.mark.parametrize(
    ("changes", "backend", "block_size"),
    [
        ({}, "FLASH_ATTN", 128),  # FlashAttention 3
        ({"cuda_version": (12, 2)}, "FLASH_ATTN", 256),  # 2
        ({"packages": EVERYTHING - {"flash_attn_interface"}}, "FLASH_ATTN", 256),
        ({"packages": EVERYTHING - {"flash_attn_interface", "flash_attn"}}, "TRITON", 64),
        ({"capability": (8, 0)}, "FLASH_ATTN", 256),
        ({"capability": (8, 9)}, "FLASH_ATTN", 256),
        ({"capability": (10, 0)}, "TRITON", 64),
        ({"capability": (8, 0), "block_size": 16}, "TRITON", 16),
        ({"block_size": 16}, "FLASH_ATTN", 16),
        ({"sinks": True}, "TRITON", 64),
        ({"softcap": True, "sliding_window": True}, "FLASH_ATTN", 128),
        ({"dtype": torch.float32}, "TRITON", 64),
        ({"dtype": torch.float64}, "SDPA", 16),
        ({"head_dim": 288}, "FLEX_ATTENTION", 16),
        ({"head_dim": 36}, "FLEX_ATTENTION", 16),
        ({"packages": frozenset()}, "SDPA", 16),
        ({"packages": frozenset(), "sinks": True}, "NAIVE", 16),
        ({"capability": (7, 5)}, "SDPA", 16),
    ],
)
def test_the_matrix(libraries, changes, backend, block_size):
    query = dataclasses.replace(GPU, **changes)
    choice = select_backend(query)
    assert (choice.backend.name, choice.block_size) == (backend, block_size)
    before = AUTOMATIC["cuda"][: AUTOMATIC["cuda"].index(backend)]
    assert tuple(choice.passed_over) == before and all(choice.passed_over.values())
    assert choice.backend.capturable == (backend in ("FLASH_ATTN", "TRITON"))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("FLASH_ATTN", {"packages": frozenset()}, "flash_attn_interface (FlashAttention 3) is not installed: pip install"),
        ("FLASH_ATTN", {"packages": frozenset(), "capability": (8, 0)}, "pip install flash-attn --no-build-isolation"),
        ("FLASH_ATTN", {"packages": frozenset(), "cuda_version": (12, 1)}, "FlashAttention 3 needs CUDA 12.3"),
        ("FLASH_ATTN", {"sinks": True}, "attention sinks not supported"),
        ("FLASH_ATTN", {"dtype": torch.float32}, "float32 not supported (only bfloat16, float16)"),
        ("FLASH_ATTN", {"capability": (7, 0)}, "compute capability 8.0 or higher, this GPU has 7.0"),
        ("FLASH_ATTN", {"capability": (10, 3)}, "up to compute capability 9.0, this GPU has 10.3"),
        ("FLASH_ATTN", {"head_dim": 100}, "head size 100"),
        ("FLASH_ATTN", {"capability": (8, 0), "block_size": 128}, "pages of 128 tokens: flash_attn reads pages of a multiple of 256"),
        ("TRITON", {"packages": frozenset()}, "pip install triton"),
        ("TRITON", {"num_heads": 130}, "65 query heads a key/value head"),
        ("FLASHINFER", {"head_dim": 96}, "only 64, 128, 256"),
        ("FLASHINFER", {"packages": frozenset({"nvcc"})}, "pip install flashinfer-python"),
        ("FLASHINFER", {"packages": frozenset({"flashinfer"})}, "nvcc, which is not found"),
        ("FLASHINFER", {"sinks": True, "softcap": True}, "softcap not supported"),
        ("FLEX_ATTENTION", {"packages": frozenset()}, "pip install triton"),
        ("SDPA", {"softcap": True}, "softcap not supported"),
        ("NAIVE", {"num_heads": 7}, "7 query heads over 2 key/value heads"),
    ],
)
def test_a_refused_setting_names_the_condition_and_those_that_would_do(name, changes, words):
    query = dataclasses.replace(GPU, **changes)
    with pytest.raises(ConfigError) as caught:
        select_backend(query, setting=name)
    assert words in caught.value.found and words in explain_backends(query)[name]
    accepted = [other for other, reason in explain_backends(query).items() if reason is None]
    assert caught.value.fix.endswith(f"one of: {', '.join(accepted) or 'none'}")


@pytest.mark.parametrize("query", [QUERY, GPU])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hip": True}, "AMD/ROCm not supported"),
        ({"kv_dtype": torch.float8_e4m3fn}, "FP8 K/V not supported"),
        ({"kv_dtype": torch.float64}, "K/V in float64 not supported"),
        ({"latent_kv": True}, "MLA not supported"),
    ],
)
def test_what_no_backend_has(query, changes, words):
    query = dataclasses.replace(query, **changes)
    assert all(words in reason for reason in explain_backends(query).values())
    with pytest.raises(ConfigError, match="(?s)no attention backend can compute this model here.*not supported"):
        select_backend(query)


def test_gpu_backends_refuse_a_cpu():
    reasons = explain_backends(dataclasses.replace(QUERY, packages=EVERYTHING))
    assert {name for name, reason in reasons.items() if reason == "needs an NVIDIA GPU"} == {"FLASH_ATTN", "TRITON", "FLASHINFER"}
    assert {name for name, reason in reasons.items() if reason is None} == {"FLEX_ATTENTION", "SDPA", "NAIVE"}


def test_a_package_that_cannot_be_imported_is_a_refusal(monkeypatch):
    """As after an update of torch: it is found, and fails when it is loaded."""
    broken = types.ModuleType("flash_attn_interface")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", broken)
    query = dataclasses.replace(GPU, packages=frozenset({"flash_attn_interface", "triton"}))
    choice = select_backend(query)
    assert choice.backend.name == "TRITON"
    assert choice.passed_over["FLASH_ATTN"].startswith("cannot be imported: cannot import name 'flash_attn_with_kvcache'")
    assert explain_backends(query)["FLASH_ATTN"] is None
    assert explain_backends(query, prepare=True)["FLASH_ATTN"] == choice.passed_over["FLASH_ATTN"]
    with pytest.raises(ConfigError, match="(?s)cannot be imported.*one of: TRITON"):
        select_backend(query, setting="FLASH_ATTN")


def test_unknown_name_lists_the_valid():
    with pytest.raises(ConfigError, match=f"(?s)attention backend = 'fast' is unknown.*auto, {', '.join(BACKENDS)}"):
        select_backend(QUERY, setting="fast")
    with pytest.raises(ConfigError, match="HPCINFER_ATTENTION_BACKEND = 'fast'"):
        select_backend(QUERY, environment="fast")


def test_xformers_is_answered_with_what_replaces_it():
    with pytest.raises(ConfigError, match="(?s)'xformers' is not part of hpcinfer.*FLASH_ATTN, or TRITON"):
        select_backend(QUERY, environment="xformers")


def test_query_of_a_model():
    config = ModelConfig(
        family="MistralForCausalLM", vocab_size=11, hidden_size=64, intermediate_size=8, num_layers=2, num_heads=8,
        num_kv_heads=2, head_dim=64, sliding_window=(None, 4),
    )
    query = attention_query(config, tp=4, block_size=16, dtype=torch.float32, device=torch.device("cpu"))
    assert (query.num_heads, query.num_kv_heads, query.sliding_window, query.capability) == (2, 1, True, None)
    assert query.packages == installed_packages() and not query.hip and not query.sinks
    sinks = dataclasses.replace(config, attention_sinks=True)
    query = attention_query(sinks, tp=4, block_size=0, dtype=torch.float32, device=torch.device("cpu"))
    assert query.sinks and query.block_size == 0 and explain_backends(query)["SDPA"] is None
    assert "attention sinks" in explain_backends(dataclasses.replace(query, device_type="cuda"))["SDPA"]


def test_installed_packages_are_found_and_not_imported(monkeypatch, tmp_path):
    (tmp_path / "flashinfer.py").write_text("raise ImportError('was imported')")
    (tmp_path / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", "")
    assert "flashinfer" in installed_packages() and "nvcc" not in installed_packages()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "nvcc" in installed_packages()


def test_nothing_optional_is_imported_by_a_choice():
    code = (
        "import sys\n"
        "for name in ('triton', 'flash_attn', 'flash_attn_interface', 'flashinfer', 'cupy'): sys.modules[name] = None\n"
        "import torch\n"
        "from hpcinfer.attention.base import AttentionQuery\n"
        "from hpcinfer.attention.registry import explain_backends, select_backend\n"
        "query = AttentionQuery(device_type='cpu', dtype=torch.float32, head_dim=64, num_heads=2, num_kv_heads=2)\n"
        "explain_backends(query); print(select_backend(query).backend.name)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout == "SDPA\n", result.stderr
