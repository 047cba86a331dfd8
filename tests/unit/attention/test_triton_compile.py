"""The attention kernels compile for GPUs that are not here, without spilling registers, into shared memory that is there, and read
keys and values 16 bytes at a time, two tiles ahead."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SHARED_KIB = {(8, 0): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227}
"""Of one program (CUDA C++ Programming Guide, compute capabilities)."""
SPILL_BYTES = 32
"""A few registers, before or after the loops."""
GPT_OSS = {"head_dim": 64, "sinks": True, "window": 128}


def check_compiled(cases: list[dict]) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.unit.attention.compile_kernels", json.dumps(cases)], cwd=ROOT, env=environment,
        capture_output=True, text=True, check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    made = [json.loads(line) for line in result.stdout.splitlines()]
    asked = [(case, kernel) for case in cases for kernel in case.get("kernels", ("decode", "join", "prefill"))]
    assert len(made) == len(asked)
    for (case, _), figures in zip(asked, made, strict=True):
        assert figures["spilled_bytes"] <= SPILL_BYTES, figures
        assert figures["shared_bytes"] <= 1024 * SHARED_KIB[tuple(case["capability"])], figures
        if figures["kernel"] != "join" and case.get("dtype") != "float32":
            assert figures["matrix_instructions"] > 0, figures
            # What is copied 4 bytes at a time is numbers of pages.
            assert 16 * figures["wide_copies"] > 4 * (4 * figures["narrow_copies"]), figures
        if figures["kernel"] == "decode":
            assert figures["buffers"] >= 2, figures


def test_common_models():
    check_compiled([
        {"capability": [8, 0], "head_dim": 128, "kernels": ["decode"]},
        {"capability": [9, 0], "head_dim": 128},
        {"capability": [9, 0], **GPT_OSS, "block_size": 16, "kernels": ["decode"]},
        {"capability": [10, 0], **GPT_OSS, "kernels": ["decode", "prefill"]},
    ])  # fmt: skip


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("capability", SHARED_KIB)
def test_all(capability, dtype):
    """Each width of columns that there is, a head size that is padded, and everything at once."""
    plain = {"capability": capability, "dtype": dtype, "kernels": ["decode", "prefill"]}
    cases = [{**plain, "head_dim": head_dim} for head_dim in (32, 64, 80, 128, 256)]
    cases.append({**plain, **GPT_OSS, "num_kv_heads": 1, "softcap": 30.0, "block_size": 16})
    check_compiled(cases)
