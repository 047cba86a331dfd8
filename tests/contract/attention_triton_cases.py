"""The contract of attention for the Triton kernels, interpreted on the CPU. Run by test_attention_triton.py in a process of its own:
Triton reads TRITON_INTERPRET when it is imported.

float32 has the smallest tiles, so that short sequences have several of them.
"""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from hpcinfer.attention.triton_backend import TritonBackend
from hpcinfer.attention.triton_decode import decode_kernel, decode_splits, decode_tiles
from hpcinfer.attention.triton_math import LOG2_E, capped
from tests.contract.attention_suite import (
    BATCHES, HEAD_RATIOS, HEAD_SIZES, Case, Inputs, Machine, check, forget_host, poisoned_memory, reference,
)  # fmt: skip

# Of triton 3.6 with numpy before 2.4.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

HOPPER = Machine(device_type="cuda", capability=(9, 0), packages=frozenset({"triton"}))
TRITON = Case(backend="TRITON")
LONG = ([1, 1, 1, 20, 1, 1], [900, 5, 400, 60, 40, 127])
"""Sequences of several splits; of less than one; of one that is just full (of 2 tiles of 64)."""


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch):
    """The interpreter keeps bfloat16 as its 16 bits, and multiplies these as whole numbers (triton 3.7)."""
    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(builder, a, b, *rest):
        return plain(builder, *(_float32(x) for x in (a, b)), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def _float32(tensor):
    if tensor.dtype.scalar.name != "bf16":
        return tensor
    wide = (tensor.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(wide, interpreter.tl.float32)


def check_triton(**changes) -> None:
    check(dataclasses.replace(TRITON, **changes), HOPPER)


@pytest.mark.parametrize("window", [None, 7, pytest.param(1, marks=pytest.mark.full), pytest.param(1000, marks=pytest.mark.full)])
@pytest.mark.parametrize("batch", BATCHES)
def test_batches(batch, window):
    check_triton(batch=batch, window=window)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("batch", ["decode", "mixed"])
def test_sinks_and_softcap(batch, window):
    check_triton(batch=batch, window=window, sinks=True)
    check_triton(batch=batch, window=window, softcap=1.5)


@pytest.mark.parametrize("window", [None, 50, 300])
def test_several_splits(window):
    tile = decode_tiles(32, 4, HOPPER.capability).tokens
    assert (decode_splits(5 * 2, min(901, (window or 901) + tile), tile) > 1) == (window != 50)
    check_triton(lens=LONG, window=window, sinks=True)


@pytest.mark.parametrize("window", [None, pytest.param(90, marks=pytest.mark.full)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_tiles(dtype, window):
    """Tiles of 128 rows and 64 keys, of which the diagonal crosses some, the window some, and some are seen whole."""
    check_triton(dtype=dtype, lens=([150, 1, 70], [100, 130, 0]), window=window, head_dim=64)


@pytest.mark.parametrize("head_dim", HEAD_SIZES)
def test_head_sizes(head_dim):
    check_triton(head_dim=head_dim, dtype=torch.float16)


@pytest.mark.parametrize("heads", HEAD_RATIOS)
def test_head_ratios(heads):
    check_triton(num_heads=heads[0], num_kv_heads=heads[1], window=9)


@pytest.mark.parametrize("block_size", [1, 3, 64, pytest.param(256, marks=pytest.mark.full)])
def test_pages(block_size):
    """A tile inside one page, and one of several; pages that are no power of two."""
    check_triton(block_size=block_size, lens=([1, 40, 1], [70, 30, 130]))


@pytest.mark.full
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("window", [None, 16, 100])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_everything_together(dtype, block_size, window, softcap, sinks):
    lens = ([1, 1, 20, 1], [300, 5, 60, 40])
    check_triton(dtype=dtype, block_size=block_size, window=window, softcap=softcap, sinks=sinks, lens=lens, head_dim=80)


def test_a_captured_step():
    """Bounds of the host above what there is, and padding entries on page 0: the entries that are real do not change."""
    case = dataclasses.replace(TRITON, lens=([1] * 5, [200, 0, 17, 0, 0]), sinks=True)
    backend = TritonBackend()
    backend.prepare(case.query(HOPPER))
    with poisoned_memory():
        inputs = Inputs.of(case, backend, HOPPER.device, case.dtype)
        for tensor in (inputs.k_cache, inputs.v_cache):
            tensor[0, 0] = 1.0
        inputs.metadata.block_tables[3:] = 0
        inputs.metadata.max_seq_len = 40_000
        forget_host(inputs.metadata)
        got = inputs.forward(backend)
    torch.testing.assert_close(got[:3].double(), reference(case)[:3], rtol=0, atol=2e-6)
    assert got.isfinite().all()


@triton.jit
def capped_kernel(x, y, scale_log2, SOFTCAP: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, capped(tl.load(x + at), scale_log2, SOFTCAP))


@pytest.mark.parametrize("softcap", [0.5, 30.0, 50.0])
def test_softcap_is_exact(softcap):
    """tanh by exp2 and by its series, over the whole range, against torch's."""
    x = torch.cat((torch.linspace(-400, 400, 3072), torch.logspace(-8, 2, 1024)))
    y = torch.empty_like(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # exp2 of a large number is infinite, as on a GPU
        capped_kernel[(1,)](x, y, LOG2_E, SOFTCAP=softcap, SIZE=len(x))
    wanted = softcap * torch.tanh(x.double() / softcap) * LOG2_E
    # Half an ulp of tanh is 3e-8; a few roundings, times the softcap.
    torch.testing.assert_close(y.double(), wanted, rtol=3e-7, atol=2e-7 * softcap)


def test_this_process_interprets():
    assert isinstance(decode_kernel, interpreter.InterpretedFunction)
