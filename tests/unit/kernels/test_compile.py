"""Every kernel that a model would launch compiles for the GPUs that hpcinfer is for, at the model's sizes. Needs no GPU.

What is launched is found by running layers on tensors without numbers (`launches`): decodes of 64 sequences and a long
prefill. Looked at is what the compiler says: no register is spilled, and the shared memory is what even small GPUs have.
"""

from __future__ import annotations

import re
import subprocess

import numpy as np
import pytest
import torch

from hpcinfer.sampling.sampler import SamplingBatch, sample
from tests.unit.kernels.launches import Launch, compiled, recorded
from tests.unit.kernels.models import MODELS, stage, step

triton = pytest.importorskip("triton", reason="triton is not installed")

META = torch.device("meta")
CAPABILITIES = (80, 90, 100)
DECODE, PREFILL = [1] * 64, [2000, 1, 47]
SHARED_BYTES = 99 * 1024
"""What a block can have on capability 8.6 and 8.9; 8.0, 9.0 and 10.0 have more."""
HALF = torch.bfloat16
ALWAYS = [("gpt-oss-20b packed", HALF, 90), ("Qwen3-0.6B", HALF, 90)]
OTHERS = [(name, HALF, capability) for name in MODELS for capability in CAPABILITIES if (name, HALF, capability) not in ALWAYS]
# The other dtypes have products of their own.
OTHERS += [(name, torch.float32, 90) for name in ("Llama-3.1-8B", "Mixtral-8x7B", "gpt-oss-20b packed")]
OTHERS += [("gpt-oss-20b packed", torch.float16, 90)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing is taken from, or left in, the user's own cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def launched(name: str, dtype: torch.dtype) -> tuple[dict[Launch, None], dict]:
    """What a step of each kind launches, each once, and the functions by name."""
    launches: list[Launch] = []
    functions: dict = {}
    with recorded(launches, functions):
        for lens in (DECODE, PREFILL):
            logits = step(stage(MODELS[name], dtype=dtype, device=META), lens)
            sample(logits, plain_draws(len(logits)))
    return dict.fromkeys(launches), functions


def plain_draws(rows: int) -> SamplingBatch:
    """Half of the rows greedy."""
    return SamplingBatch(
        temperature=np.arange(rows) % 2 * 0.7, top_k=np.zeros(rows, np.int64), top_p=np.ones(rows), min_p=np.zeros(rows),
        uniforms=np.full(rows, 0.5),
    )


def stack_bytes(cubin: bytes, tmp_path) -> int:
    """Local memory of a thread: where registers go that are too many."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", usage.stdout + usage.stderr)
    return int(found[1]) + int(found[2])


@pytest.mark.parametrize(
    ("name", "dtype", "capability"), [*ALWAYS, *(pytest.param(*case, marks=pytest.mark.full) for case in OTHERS)]
)
def test_kernels_of_a_model(name, dtype, capability, tmp_path):
    launches, functions = launched(name, dtype)
    for launch in launches:
        kernel = compiled(functions[launch.kernel], launch, capability)
        assert kernel.asm["cubin"] and kernel.metadata.shared <= SHARED_BYTES, launch
        assert stack_bytes(kernel.asm["cubin"], tmp_path) <= 32, launch
        if launch.kernel == "_rms_norm_kernel" and dtype == torch.bfloat16:
            # 16 bytes an access; an odd one would be a sign that the alignment is not known.
            accesses = re.findall(r"(?:ld|st)\.global\S*", kernel.asm["ptx"])
            assert accesses and all(".v4.b32" in access for access in accesses), accesses


def test_what_is_launched():
    """The kernels of a layer, in their order: a look at one decode of each kind of model."""
    layer = ["_rms_norm_kernel", "_heads_kernel", "_rms_norm_kernel"]
    draw = ["_best_kernel", "_sum_kernel", "_pick_kernel"]
    mixture = ["_choose_kernel", "_count_kernel", "_sort_kernel", "_product_kernel", "_product_kernel", "_combine_kernel"]
    kernels = {}
    for name in ("Llama-3.1-8B", "gpt-oss-20b", "GPT-2"):
        launches: list[Launch] = []
        with recorded(launches, {}):
            model = stage(MODELS[name], dtype=torch.bfloat16, device=META)
            sample(step(model, DECODE), plain_draws(64))
        kernels[name] = [launch.kernel for launch in launches]
    assert kernels["Llama-3.1-8B"] == [*layer, "_gate_kernel"] * 2 + ["_rms_norm_kernel", *draw]
    assert kernels["gpt-oss-20b"] == [*layer, *mixture] * 2 + ["_rms_norm_kernel", *draw]
    assert kernels["GPT-2"] == ["_heads_kernel"] * 2 + draw


def test_numbers_of_a_step_compile_nothing_new():
    """Kernels that get the number of pairs or tiles are not specialised for it: another batch must not compile in mid-run."""
    launches: list[Launch] = []
    with recorded(launches, {}):
        model = stage(MODELS["Qwen3-30B-A3B"], dtype=torch.bfloat16, device=META)
        for rows in (1, 2, 16, 17):
            step(model, [1] * rows)
    assert len(set(launches)) == len({launch.kernel for launch in launches}) + 2  # a norm alone and with a sum, two products
