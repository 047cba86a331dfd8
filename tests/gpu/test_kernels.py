"""The Triton kernels on a GPU at the sizes of real models, and steps that wait for nothing and can be captured.

The comparisons are those of tests/unit/kernels; their tolerances are explained there.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from hpcinfer.kernels import draw, norm
from hpcinfer.kernels.gate import ACTIVATIONS, Gate
from hpcinfer.kernels.routing import Choice
from hpcinfer.kernels.select import uses_triton
from hpcinfer.models.random_weights import fill_random
from hpcinfer.parallel.segments import run_to_end
from hpcinfer.sampling.sampler import SamplingBatch, sample
from tests.unit.kernels.models import MODELS, inputs, stage

pytest.importorskip("triton", reason="triton is not installed")

from tests.unit.kernels import checks  # noqa: E402 - imports triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GATES = [*(Gate(activation=name) for name in ACTIVATIONS), Gate(activation="silu", limit=7.0)]
CLAMPED = Gate(activation="silu", limit=7.0)


def test_a_tensor_on_the_gpu_takes_the_kernel(device, monkeypatch):
    from hpcinfer.kernels import triton_norm

    x = torch.randn(3, 64, device=device)
    assert uses_triton(x) and not uses_triton(x.cpu()) and not uses_triton(x.double())
    monkeypatch.setattr(triton_norm, "rms_norm", lambda *args, **kwargs: "the kernel")
    assert norm.rms_norm(x, x[0], 1e-5) == "the kernel"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("rows", "size"), [(64, 4096), (2000, 2880), (1, 5120), (7, 48), (0, 64), (300, 16384)])
def test_norm(device, rows, size, wide, dtype):
    checks.check_norm(device, rows, size, dtype, wide=wide)
    checks.check_norm(device, rows, size, dtype, wide=wide, strided=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("norms", "rotates"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "page"),
    [
        (64, 32, 8, 128, 16), (3000, 16, 8, 128, 16), (500, 64, 8, 64, 32), (33, 12, 12, 64, 16), (5, 40, 8, 80, 1),
        (0, 2, 2, 8, 4),
    ],
)
def test_heads(device, tokens, heads, kv_heads, head_dim, page, norms, rotates, dtype):
    checks.check_heads(device, tokens, heads, kv_heads, head_dim, dtype, norms=norms, rotates=rotates, page=page)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GATES, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(64, 14336), (1500, 3072), (3, 70), (0, 8)])
def test_gate(device, rows, size, kind, dtype):
    checks.check_gate(device, rows, size, dtype, kind)


@pytest.mark.parametrize("kind", GATES, ids=str)
def test_gate_of_nan(device, kind):
    checks.check_gate_keeps_nan(device, kind)


def draws(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Temperatures, every fifth 0 and some next to it, and uniform numbers."""
    generator = torch.Generator().manual_seed(rows)
    temperature = torch.rand(rows, dtype=torch.float64, generator=generator) * 2 + 0.01
    temperature[::5], temperature[1::50], temperature[2::50] = 0, 5e-324, 1e-150
    return temperature, torch.rand(rows, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(
    ("rows", "vocabulary"), [(20_000, 97), (5000, 5003), (256, 151_936), (300, 50_257), (64, 201_088), (1, 4096), (0, 10)]
)
def test_draws(device, rows, vocabulary):
    checks.check_draw(device, checks.numbers(rows, vocabulary, seed=rows, scale=3), *draws(rows))


def test_draws_of_few_different_logits(device):
    logits = torch.randint(0, 3, (2000, 9000), generator=torch.Generator().manual_seed(1)).float()
    logits[logits == 0] = -torch.inf
    logits[:, 4400] = 1.0
    checks.check_draw(device, logits, *draws(2000))


def test_draws_at_the_ends_and_borders(device):
    checks.check_draws_at_the_borders(device)
    checks.check_the_last_uniform_number(device)
    checks.check_draw_of_what_is_no_number(device)


def test_a_draw_does_not_depend_on_the_batch(device):
    logits = checks.numbers(50, 151_936, seed=1, scale=2).to(device)
    temperature, uniforms = (t.to(device) for t in draws(50))
    together = draw.draw(logits, temperature, uniforms)
    alone = [draw.draw(logits[row : row + 1], temperature[row : row + 1], uniforms[row : row + 1]).item() for row in range(50)]
    assert together.tolist() == alone


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("tokens", "num_experts", "chosen"), [(64, 128, 8), (3000, 32, 4), (5, 8, 2), (0, 8, 2)])
@pytest.mark.parametrize("softmax_first", [False, True])
def test_choice(device, softmax_first, tokens, num_experts, chosen, masked, dtype):
    choice = Choice(num_chosen=chosen, softmax_first=softmax_first, normalize=True, rounded=True)
    checks.check_choice(device, tokens, num_experts, choice, dtype, masked=masked)
    checks.check_choice_of_nan(device, dataclasses.replace(choice, num_chosen=2))


@pytest.mark.parametrize(("tokens", "chosen", "tile"), [(64, 8, 16), (1, 1, 16), (9000, 8, 128), (3, 4, 16)])
@pytest.mark.parametrize(("num_experts", "first", "num_local"), [(128, 0, 128), (32, 8, 8), (4, 3, 1)])
def test_sorted_pairs(device, num_experts, first, num_local, tokens, chosen, tile):
    held = checks.make_experts(num_experts, first, num_local, 2, 2, torch.float32)
    checks.check_sorted_pairs(device, tokens, chosen, held, tile)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_experts", "first", "num_local", "size", "hidden", "tokens", "chosen"),
    [
        (128, 0, 128, 768, 2048, 64, 8), (32, 8, 8, 2880, 2880, 64, 4), (8, 0, 8, 1792, 1024, 700, 2), (5, 1, 3, 45, 50, 40, 3),
        (4, 4, 0, 32, 32, 9, 2), (3, 0, 3, 32, 32, 0, 2), (2, 0, 2, 256, 512, 1000, 1),
    ],
)
def test_experts(device, num_experts, first, num_local, size, hidden, tokens, chosen, dtype):
    held = checks.make_experts(num_experts, first, num_local, size, hidden, dtype)
    checks.check_experts(device, held, tokens, chosen, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [1, 64, 150, 900])
def test_experts_with_biases_and_clamped_gates(device, packed, tokens, dtype):
    """Tiles of each size of the table, with a matrix that no tile divides."""
    held = checks.make_experts(16, 0, 16, 1440, 2880, dtype, bias=True, packed=packed, kind=CLAMPED)
    checks.check_experts(device, held, tokens, 4, dtype)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("name", MODELS)
def test_a_decode_waits_for_nothing_and_can_be_captured(device, name):
    """The same numbers bit by bit from a step launched one by one and from its CUDA graph, with padding at the end."""
    model = stage(dataclasses.replace(MODELS[name], vocab_size=32_000), dtype=torch.bfloat16, device=device)
    fill_random(model)
    kv = model.allocate_kv(num_blocks=16, block_size=16)
    made = inputs([1] * 16, device)
    made = dataclasses.replace(made, metadata=dataclasses.replace(made.metadata, valid=torch.arange(16, device=device) < 11))
    temperature, uniforms = (t.to(device) for t in draws(16))

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        logits = run_to_end(model.forward(made, kv))
        return logits, draw.draw(logits, temperature, uniforms)

    with torch.inference_mode():
        step()  # compiles the kernels
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            logits, tokens = step()
            sample(logits, SamplingBatch(
                temperature=np.full(16, 0.8), top_k=np.arange(16), top_p=np.full(16, 0.9), min_p=np.zeros(16),
                uniforms=np.full(16, 0.5),
            ))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert logits.isfinite().all()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for t in captured:
            t.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured[0], logits) and torch.equal(captured[1], tokens)
    for load in model.expert_load().values():
        assert load.sum() % 11 == 0 and load.sum() > 0  # padding is not counted, by any of the runs
