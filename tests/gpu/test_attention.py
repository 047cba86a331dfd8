"""The contract of attention on a GPU, with the real libraries where they are installed, and decodes in CUDA graphs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hpcinfer.attention.base import AttentionBackend
from hpcinfer.attention.registry import BACKENDS, installed_packages
from tests.contract.attention_suite import BATCHES, HEAD_RATIOS, HEAD_SIZES, Case, Inputs, Machine, check, forget_host

pytestmark = [
    # Of torch's compiler, when FlexAttention loads it and when it sees float32.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

TOLERANCES = {
    # exp2 and products are rounded a few times more than on a CPU, and the hardware's exp2 has an error of 2 ulp: relative errors of
    # a weight of up to 2**-21, of values up to 4.
    torch.float32: 1e-5,
    # Weights and output are rounded to the dtype (half an ulp of values up to 4 is 2**-9 and 2**-6), which averages out in part.
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
LONG = ([1, 700, 1, 333, 1], [2000, 1000, 5, 0, 700])
"""Several splits of a decode, many tiles of a prefill."""


@pytest.fixture(autouse=True)
def deterministic_products(monkeypatch):
    """Poisoned memory needs torch's deterministic mode, which needs this of cuBLAS."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def compiled_anew():
    """Torch compiles FlexAttention for so many forms and no more; the cases have them all."""
    yield
    torch._dynamo.reset()


@pytest.fixture
def machine(device) -> Machine:
    return Machine(
        device=device, device_type="cuda", capability=torch.cuda.get_device_capability(device),
        cuda_version=tuple(map(int, torch.version.cuda.split(".")[:2])), packages=installed_packages(),
        tolerances={torch.float64: 1e-12, **TOLERANCES},
    )


def with_pages(case: Case, machine: Machine) -> Case:
    """The case with the page size that its backend prefers, or skipped: the backend refuses, or cannot be loaded."""
    backend, query = BACKENDS[case.backend](), dataclasses.replace(case.query(machine), block_size=0)
    reason = backend.refuses(query)
    if reason is not None:
        pytest.skip(f"{case.backend} refuses: {reason}")
    try:
        backend.prepare(query)
    except ImportError as error:
        pytest.skip(f"{case.backend} cannot be imported: {error}")
    return dataclasses.replace(case, block_size=backend.preferred_block_size(query))


def check_on(machine: Machine, **changes) -> None:
    check(with_pages(dataclasses.replace(Case(dtype=torch.bfloat16, head_dim=128), **changes), machine), machine)


@pytest.mark.parametrize("window", [None, 1, 7, 1000])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_batches(machine, backend, batch, window):
    check_on(machine, backend=backend, batch=batch, window=window)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_long_sequences(machine, backend, dtype, softcap, sinks, window):
    check_on(
        machine, backend=backend, dtype=dtype, softcap=softcap, sinks=sinks, window=window, lens=LONG, num_heads=8, head_dim=64
    )


@pytest.mark.parametrize("head_dim", HEAD_SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_sizes(machine, backend, head_dim):
    for batch in ("mixed", "decode"):
        check_on(machine, backend=backend, head_dim=head_dim, batch=batch)


@pytest.mark.parametrize("heads", HEAD_RATIOS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_ratios(machine, backend, heads):
    for batch in ("mixed", "decode"):
        check_on(machine, backend=backend, num_heads=heads[0], num_kv_heads=heads[1], batch=batch)


@pytest.mark.parametrize("block_size", [1, 3, 16, 64, 256])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pages(machine, backend, block_size):
    """Every page size that the backend takes; a refusal names the sizes."""
    case = Case(backend=backend, dtype=torch.bfloat16, head_dim=128, block_size=block_size, lens=([1, 40, 1], [70, 30, 130]))
    with_pages(case, machine)
    check(case, machine)


@pytest.mark.parametrize("features", [{}, {"window": 100}, {"sinks": True}, {"softcap": 30.0}], ids=str)
@pytest.mark.parametrize("backend", [name for name, make in BACKENDS.items() if make.capturable])
def test_a_captured_decode_replays_what_eager_computes(machine, backend, features):
    """Bit for bit, also with other sequences in the graph's tensors; the host's numbers are upper bounds."""
    case = Case(
        backend=backend, dtype=torch.bfloat16, num_heads=8, head_dim=128, lens=([1] * 6, [300, 1, 17, 2000, 63, 900]), **features
    )
    case = with_pages(case, machine)
    other = dataclasses.replace(case, lens=([1] * 6, [2000, 300, 900, 17, 1, 63]), seed=1)
    made = BACKENDS[backend]()
    made.prepare(case.query(machine))
    static, changed = (_bounded(Inputs.of(c, made, machine.device, c.dtype), case.block_size) for c in (case, other))
    with torch.inference_mode():
        wanted = [inputs.forward(made).clone() for inputs in (static, changed)]
        graph, out = _capture(static, made)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, wanted[0])
        for name in ("q", "k_cache", "v_cache"):
            getattr(static, name).copy_(getattr(changed, name))
        for name in ("seq_lens", "block_tables"):
            getattr(static.metadata, name).copy_(getattr(changed.metadata, name))
        graph.replay()
        assert torch.equal(out, wanted[1]) and not torch.equal(wanted[0], wanted[1])


def _bounded(inputs: Inputs, block_size: int, longest: int = 4096) -> Inputs:
    """As a captured step has it: block tables as wide as the longest sequence there may be, on the host only bounds."""
    tables = inputs.metadata.block_tables
    wide = torch.zeros((len(tables), -(-longest // block_size)), dtype=torch.int32, device=tables.device)
    wide[:, : tables.shape[1]] = tables
    inputs.metadata.block_tables = wide
    inputs.metadata.max_seq_len = longest
    forget_host(inputs.metadata)
    return inputs


def _capture(inputs: Inputs, backend: AttentionBackend) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        inputs.forward(backend)
    torch.cuda.current_stream().wait_stream(stream)
    inputs.metadata.scratch.clear()  # what was worked out before belongs to other sequences
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = inputs.forward(backend)
    return graph, out
