"""Every kernel at sizes that are no powers of two, one row, no rows, and parts of larger tensors."""

from __future__ import annotations

import pytest
import torch

from hpcinfer.kernels.gate import ACTIVATIONS, Gate
from hpcinfer.kernels.routing import Choice
from tests.unit.kernels import checks
from tests.unit.kernels.checks import CPU, numbers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GATES = [*(Gate(activation=name) for name in ACTIVATIONS), Gate(activation="silu", limit=1.5)]
CLAMPED = Gate(activation="silu", limit=7.0)

# numpy says what a GPU computes in silence; Triton 3.6 indexes as newer versions of numpy do not want it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("rows", "size"), [(3, 48), (1, 1000), (2, 64), (0, 64), (2, 1)])
def test_norm(rows, size, wide, dtype):
    checks.check_norm(CPU, rows, size, dtype, wide=wide)


def test_norm_of_parts_of_rows():
    checks.check_norm(CPU, 4, 50, torch.bfloat16, wide=False, strided=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("norms", "rotates"), [(False, False), (False, True), (True, True), (True, False)])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "page"), [(5, 4, 2, 16, 4), (1, 3, 1, 24, 3), (2, 40, 8, 80, 1), (0, 2, 2, 8, 4)]
)
def test_heads(tokens, heads, kv_heads, head_dim, page, norms, rotates, dtype):
    checks.check_heads(CPU, tokens, heads, kv_heads, head_dim, dtype, norms=norms, rotates=rotates, page=page)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GATES, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(3, 70), (1, 1500), (0, 8)])
def test_gate(rows, size, kind, dtype):
    checks.check_gate(CPU, rows, size, dtype, kind)


@pytest.mark.parametrize("kind", GATES, ids=str)
def test_gate_of_nan(kind):
    checks.check_gate_keeps_nan(CPU, kind)


def draws(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Temperatures and uniform numbers: a fifth greedy, some as small as a float can be."""
    generator = torch.Generator().manual_seed(rows)
    temperature = torch.rand(rows, dtype=torch.float64, generator=generator) * 2 + 0.01
    temperature[::5] = 0
    temperature[1::50] = 5e-324
    temperature[2::50] = 1e-150
    uniforms = torch.rand(rows, dtype=torch.float64, generator=generator)
    uniforms[3::50] = 0
    return temperature, uniforms


# The interpreter needs some milliseconds a row and chunk.
DRAWS = [(120, 97, 128), (40, 211, 64), (1, 16, 16), (0, 50, 64), (3, 9000, 4096)]


@pytest.mark.parametrize(
    ("rows", "vocabulary", "chunk"),
    [*DRAWS, pytest.param(1500, 97, 128, marks=[pytest.mark.full, pytest.mark.timeout(600)])],
)
def test_draws(rows, vocabulary, chunk):
    checks.check_draw(CPU, numbers(rows, vocabulary, seed=rows, scale=3), *draws(rows), chunk=chunk)


@pytest.mark.parametrize("chunk", [16, 128])
def test_the_ends_and_borders_of_the_distribution(chunk):
    checks.check_draws_at_the_borders(CPU, chunk=chunk)
    checks.check_the_last_uniform_number(CPU, chunk=chunk)


def test_draws_of_few_different_logits():
    """Equal best ones, and tokens without any probability at both ends and between."""
    logits = torch.randint(0, 3, (30, 90), generator=torch.Generator().manual_seed(1)).float()
    logits[logits == 0] = -torch.inf
    logits[:, 40] = 1.0
    checks.check_draw(CPU, logits, *draws(30), chunk=32)


def test_a_draw_from_a_large_vocabulary():
    checks.check_draw(CPU, numbers(3, 151_936, seed=2, scale=2), *(t[10:13] for t in draws(20)))


def test_draws_of_a_part_of_the_rows():
    checks.check_draw(CPU, numbers(20, 300, seed=3)[:, 100:250], *draws(20), chunk=64)


@pytest.mark.parametrize("chunk", [16, 128])
def test_draws_of_what_is_no_number(chunk):
    checks.check_draw_of_what_is_no_number(CPU, chunk=chunk)


CHOICES = [
    Choice(num_chosen=3, softmax_first=True, normalize=True, rounded=True),
    Choice(num_chosen=3, softmax_first=True, normalize=False, rounded=False),
    Choice(num_chosen=4, softmax_first=False, normalize=False, rounded=True),
    Choice(num_chosen=1, softmax_first=False, normalize=False, rounded=False),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize(("tokens", "num_experts", "masked"), [(5, 7, False), (4, 40, True), (0, 8, False)])
def test_choice(tokens, num_experts, masked, choice, dtype):
    checks.check_choice(CPU, tokens, num_experts, choice, dtype, masked=masked)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_choice_of_nan(choice):
    checks.check_choice_of_nan(CPU, choice)


# experts, first, local; tokens, chosen
PLACES = [(5, 0, 5, 9, 2), (7, 2, 3, 11, 3), (2, 0, 2, 90, 1), (6, 5, 1, 1, 4), (4, 4, 0, 3, 2), (3, 0, 3, 0, 2)]


@pytest.mark.parametrize(("tokens", "chosen", "tile"), [(20, 2, 4), (1, 1, 16), (700, 3, 16), (3, 4, 2)])
@pytest.mark.parametrize(("num_experts", "first", "num_local"), [(5, 0, 5), (9, 3, 4), (4, 3, 1)])
def test_sorted_pairs(num_experts, first, num_local, tokens, chosen, tile):
    held = checks.make_experts(num_experts, first, num_local, 2, 2, torch.float32)
    checks.check_sorted_pairs(CPU, tokens, chosen, held, tile)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_experts", "first", "num_local", "tokens", "chosen"), PLACES)
def test_experts(num_experts, first, num_local, tokens, chosen, dtype):
    held = checks.make_experts(num_experts, first, num_local, 45, 50, dtype)
    checks.check_experts(CPU, held, tokens, chosen, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
def test_experts_with_biases_and_clamped_gates(packed, dtype):
    held = checks.make_experts(5, 1, 3, 96, 160, dtype, bias=True, packed=packed, kind=CLAMPED)
    checks.check_experts(CPU, held, 13, 3, dtype)


def test_a_rank_without_the_bias_of_the_down_projection():
    import dataclasses

    held = dataclasses.replace(checks.make_experts(3, 0, 3, 20, 16, torch.float32, bias=True), down_bias=None)
    checks.check_experts(CPU, held, 6, 2, torch.float32)
