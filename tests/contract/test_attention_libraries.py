"""The contract of attention for the backends that call GPU libraries, on stand-ins that take what the libraries take."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from hpcinfer.attention.flash_infer import FlashInferBackend
from hpcinfer.attention.registry import BACKENDS
from tests.contract.attention_suite import BATCHES, HEAD_RATIOS, HEAD_SIZES, Case, Inputs, Machine, check, forget_host, reference
from tests.contract.flash_attn_stand_in import flash_attn, flash_attn_interface
from tests.contract.flashinfer_stand_in import flashinfer

AMPERE = Machine(device_type="cuda", capability=(8, 0), cuda_version=(12, 8), packages=frozenset({"flash_attn"}))
HOPPER = dataclasses.replace(AMPERE, capability=(9, 0), packages=frozenset({"flash_attn_interface"}))
JIT = dataclasses.replace(AMPERE, packages=frozenset({"flashinfer", "nvcc"}))
HALF = Case(dtype=torch.float16, head_dim=64)

LIBRARIES = {
    "FlashAttention 2": (AMPERE, dataclasses.replace(HALF, backend="FLASH_ATTN", block_size=256), flash_attn("2.8.3")),
    "FlashAttention 2.8.4": (AMPERE, dataclasses.replace(HALF, backend="FLASH_ATTN", block_size=256), flash_attn("2.8.4")),
    "FlashAttention 3": (HOPPER, dataclasses.replace(HALF, backend="FLASH_ATTN"), flash_attn_interface()),
    "FlashInfer": (JIT, dataclasses.replace(HALF, backend="FLASHINFER"), flashinfer()),
}
"""Name -> a machine that has it, a case for it, the module."""
WITH_SINKS = ("FlashInfer",)


@pytest.fixture(params=LIBRARIES)
def library(request, monkeypatch) -> str:
    """Makes one of them importable."""
    module = LIBRARIES[request.param][2]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return request.param


def check_with(library: str, **changes) -> None:
    machine, case, _ = LIBRARIES[library]
    check(dataclasses.replace(case, **changes), machine)


@pytest.mark.parametrize("window", [None, 7, pytest.param(1, marks=pytest.mark.full), pytest.param(1000, marks=pytest.mark.full)])
@pytest.mark.parametrize("batch", BATCHES)
def test_batches(library, batch, window):
    check_with(library, batch=batch, window=window)
    if library in WITH_SINKS:
        check_with(library, batch=batch, window=window, sinks=True)


def test_softcap(library):
    for batch in ("mixed", "decode"):
        check_with(library, batch=batch, softcap=1.5, window=9)


def test_head_sizes(library):
    sizes = (64, 128, 256) if library == "FlashInfer" else HEAD_SIZES
    for head_dim in sizes:
        check_with(library, head_dim=head_dim)


@pytest.mark.parametrize("heads", HEAD_RATIOS)
def test_head_ratios(library, heads):
    for batch in ("mixed", "decode"):
        check_with(library, num_heads=heads[0], num_kv_heads=heads[1], batch=batch)


def test_bfloat16(library):
    check_with(library, dtype=torch.bfloat16)


def test_pages(library):
    sizes = (256, 512) if LIBRARIES[library][1].block_size == 256 else (1, 3, 16, 64)
    for block_size in sizes:
        check_with(library, block_size=block_size, lens=([1, 1, 40, 3], [600, 255, 300, 0]))


def test_a_captured_step(library):
    """Decodes of a backend that can be captured need bounds alone of the host."""
    machine, case, _ = LIBRARIES[library]
    backend = BACKENDS[case.backend]()
    if not backend.capturable:
        pytest.skip(f"{backend.name} is not captured")
    case = dataclasses.replace(case, batch="decode")
    backend.prepare(case.query(machine))
    inputs = Inputs.of(case, backend, machine.device, case.dtype)
    inputs.metadata.max_seq_len = 40_000
    forget_host(inputs.metadata)
    torch.testing.assert_close(inputs.forward(backend).double(), reference(case), rtol=0, atol=4e-3)


def test_a_plan_belongs_to_its_microbatch(monkeypatch):
    """Two microbatches take turns layer by layer; a wrapper is used again only when its microbatch is gone."""
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer())
    for sinks in (False, True):
        cases = [dataclasses.replace(HALF, backend="FLASHINFER", batch=name, sinks=sinks) for name in ("mixed", "chunks")]
        backend = FlashInferBackend()
        backend.prepare(cases[0].query(JIT))
        inputs = [Inputs.of(case, backend, JIT.device, case.dtype) for case in cases]
        for _ in range(2):
            for case, given in zip(cases, inputs):
                torch.testing.assert_close(given.forward(backend).double(), reference(case), rtol=0, atol=4e-3)
        assert len({id(given.metadata.scratch) for given in inputs}) == 2 and not any(backend._free.values())
        del given
        inputs.clear()
        (free,) = backend._free.values()
        assert len(free) == 2
        Inputs.of(cases[0], backend, JIT.device, torch.float16).forward(backend)
        assert len(free) == 2
