"""Every attention backend computes what the naive one computes in float64.

Pages lie in random order, unused slots hold NaN, and fresh memory is filled with NaN, so that an output that is not
written or a slot that must not be read shows. Tolerances: rounding of probabilities and output in the dtype (half an
ulp is 2**-24, 2**-11, 2**-8 of values up to 4), times the few roundings on the way.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from hpcinfer.attention.base import AttentionQuery, AttentionSpec
from hpcinfer.attention.metadata import build_metadata
from hpcinfer.attention.naive import NaiveBackend
from hpcinfer.attention.registry import BACKENDS
from hpcinfer.batch import MicroBatch

CPU = torch.device("cpu")
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}

# name -> (query lengths, context lengths) of the sequences of a microbatch
BATCHES = {
    "empty": ([], []),
    "one token": ([1], [0]),
    "prefill": ([17], [0]),
    "ragged prefill": ([3, 1, 40, 8], [0, 0, 0, 0]),
    "chunks": ([5, 16, 2], [16, 3, 31]),
    "decode": ([1] * 6, [15, 16, 17, 3, 0, 70]),
    "uneven decode": ([1] * 5, [300, 1, 299, 2, 150]),
    "mixed": ([1, 9, 1, 1, 12, 1], [20, 0, 33, 0, 18, 64]),
    "nothing to do for one": ([1, 0, 4], [8, 5, 0]),
}


@dataclasses.dataclass
class Case:
    """One call of a backend and of the reference on the same numbers."""

    batch: str = "mixed"
    backend: str = "SDPA"
    dtype: torch.dtype = torch.float32
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    block_size: int = 16
    window: int | None = None
    sinks: bool = False
    seed: int = 0

    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The backend's output and the reference's, [T, N, H]."""
        microbatch = self._microbatch()
        generator = torch.Generator().manual_seed(self.seed)
        total = int((microbatch.query_lens + microbatch.context_lens).sum())
        kv = torch.randn(2, total, self.num_kv_heads, self.head_dim, generator=generator).to(self.dtype)
        merged = torch.randn(microbatch.num_tokens, self.num_heads + 1, self.head_dim, generator=generator)
        q = merged.to(self.dtype)[:, : self.num_heads]  # strided, as a slice of a merged projection is
        return self._run(BACKENDS[self.backend](), q, kv, microbatch), self._run(
            NaiveBackend(), q.double(), kv.double(), microbatch
        )

    def _microbatch(self) -> MicroBatch:
        query_lens, context_lens = (np.array(lens, np.int32) for lens in BATCHES[self.batch])
        needed = -(-(query_lens + context_lens) // self.block_size)
        self.num_blocks = 2 * int(needed.sum()) + 3
        order = np.random.default_rng(self.seed).permutation(self.num_blocks)
        tables = np.zeros((len(needed), int(needed.max(initial=0))), np.int32)
        for r, (n, start) in enumerate(zip(needed, np.cumsum(needed) - needed)):
            tables[r, :n] = order[start : start + n]
        return MicroBatch(
            tick=0, sequence_ids=tuple(range(len(needed))), token_ids=np.zeros(query_lens.sum(), np.int32),
            query_lens=query_lens, context_lens=context_lens, block_tables=tables,
            samples=np.ones(len(needed), bool),
        )

    def _sinks(self, dtype: torch.dtype) -> torch.Tensor | None:
        """[N] from one that changes next to nothing to one that takes nearly all."""
        if not self.sinks:
            return None
        return torch.linspace(-4, 6, self.num_heads).to(self.dtype).to(dtype)

    def _run(self, backend, q, kv, microbatch) -> torch.Tensor:
        layout = backend.kv_layout(self.block_size, self.num_kv_heads, self.head_dim)
        k_cache, v_cache = (torch.full(layout.shape(self.num_blocks), float("nan"), dtype=q.dtype) for _ in range(2))
        lens, context = microbatch.query_lens.tolist(), microbatch.context_lens.tolist()
        parts = [part.split([n for pair in zip(context, lens) for n in pair]) for part in kv] if lens else []
        if any(context):
            # What earlier microbatches wrote.
            past = dataclasses.replace(
                microbatch, token_ids=np.zeros(sum(context), np.int32),
                query_lens=microbatch.context_lens, context_lens=np.zeros_like(microbatch.context_lens),
            )
            old = [torch.cat(part[0::2]) for part in parts]
            backend.write(*old, k_cache, v_cache, build_metadata(past, self.block_size, CPU).slot_mapping)
        k, v = (torch.cat(part[1::2]) for part in parts) if lens else kv
        spec = AttentionSpec(
            num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim,
            scale=self.head_dim**-0.5, sliding_window=self.window, sinks=self._sinks(q.dtype),
        )
        metadata = build_metadata(microbatch, self.block_size, CPU)
        backend.write(k, v, k_cache, v_cache, metadata.slot_mapping)
        first = backend.forward(q, k, v, k_cache, v_cache, metadata, spec)
        # A second layer uses what the first left in the metadata's scratch and in the backend's buffers.
        second = backend.forward(q, k, v, k_cache, v_cache, metadata, spec)
        assert torch.equal(first, second)
        assert first.is_contiguous() and first.dtype == q.dtype
        return second


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


def check(case: Case) -> None:
    query = AttentionQuery(
        device_type="cpu", dtype=case.dtype, head_dim=case.head_dim, num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads, block_size=case.block_size, sliding_window=case.window is not None,
        sinks=case.sinks,
    )
    reason = BACKENDS[case.backend]().refuses(query)
    if reason is not None:
        pytest.skip(f"{case.backend} refuses: {reason}")
    got, wanted = case.outputs()
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=TOLERANCES[case.dtype])


@pytest.mark.parametrize("window", [None, 1, 7, 16, 1000])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_batches(backend, batch, window):
    check(Case(backend=backend, batch=batch, window=window))


@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks(backend, batch, window):
    check(Case(backend=backend, batch=batch, window=window, sinks=True))


@pytest.mark.parametrize("heads", [(4, 4), (6, 3), (8, 1)])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks_of_grouped_heads(backend, dtype, heads):
    for batch in ("mixed", "uneven decode"):
        check(Case(backend=backend, batch=batch, dtype=dtype, num_heads=heads[0], num_kv_heads=heads[1], sinks=True))


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_sizes(backend, head_dim):
    check(Case(backend=backend, head_dim=head_dim))


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 3), (3, 1), (8, 2), (8, 1), (14, 2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_ratios(backend, heads):
    check(Case(backend=backend, num_heads=heads[0], num_kv_heads=heads[1], window=9))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend, dtype):
    for window in (None, 9):
        check(Case(backend=backend, dtype=dtype, window=window))


@pytest.mark.parametrize("block_size", [1, 3, 8, 64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_block_sizes(backend, block_size):
    for seed in range(3):
        check(Case(backend=backend, block_size=block_size, seed=seed))


@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces(backend, monkeypatch):
    """Long chunks and large groups are cut into pieces; the cuts do not show."""
    from hpcinfer.attention import sdpa

    monkeypatch.setattr(sdpa, "_MASK_ELEMENTS", 64)
    monkeypatch.setattr(sdpa, "_GROUP_ELEMENTS", 4000)
    for window in (None, 5):
        check(Case(backend=backend, window=window))
        check(Case(backend=backend, window=window, sinks=True))
        check(Case(backend=backend, batch="uneven decode", window=window))


def test_naive_against_the_formula():
    """The reference itself, on numbers small enough to write the sums out, with window, softcap and sinks."""
    q, k, v = (torch.randn(3, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3))
    microbatch = MicroBatch(
        tick=0, sequence_ids=(0,), token_ids=np.zeros(3, np.int32), query_lens=np.array([3], np.int32),
        context_lens=np.array([0], np.int32), block_tables=np.array([[1, 0]], np.int32), samples=np.array([True]),
    )
    metadata = build_metadata(microbatch, 2, CPU)
    backend = NaiveBackend()
    pages = [torch.full(backend.kv_layout(2, 1, 4).shape(2), float("nan"), dtype=torch.float64) for _ in range(2)]
    backend.write(k, v, *pages, metadata.slot_mapping)
    spec = AttentionSpec(
        num_heads=1, num_kv_heads=1, head_dim=4, scale=0.5, sliding_window=2, softcap=1.5, sinks=torch.tensor([0.25])
    )
    got = backend.forward(q, k, v, *pages, metadata, spec)
    for i in range(3):
        seen = [j for j in (i - 1, i) if j >= 0]
        scores = [1.5 * np.tanh(float(q[i, 0] @ k[j, 0]) * 0.5 / 1.5) for j in seen]
        total = sum(np.exp(score) for score in scores) + np.exp(0.25)
        wanted = sum(np.exp(score) / total * v[j, 0] for score, j in zip(scores, seen))
        torch.testing.assert_close(got[i, 0], wanted, rtol=0, atol=1e-12)
