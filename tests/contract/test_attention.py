"""The contract of attention for the backends that run on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torch.nn.attention.flex_attention import create_block_mask

from hpcinfer.attention import flex
from hpcinfer.attention.base import AttentionSpec
from hpcinfer.attention.metadata import build_metadata
from hpcinfer.attention.naive import NaiveBackend
from hpcinfer.batch import MicroBatch
from tests.contract.attention_suite import BATCHES, HEAD_RATIOS, HEAD_SIZES, TOLERANCES, Case, check

CPU = torch.device("cpu")
BACKENDS = ("SDPA", "NAIVE", "FLEX_ATTENTION")


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


@pytest.mark.parametrize("batch", ["mixed", "decode"])
@pytest.mark.parametrize("backend", ["NAIVE", "FLEX_ATTENTION"])
def test_softcap(backend, batch):
    for window in (None, 9):
        check(Case(backend=backend, batch=batch, window=window, softcap=1.5, sinks=window is None))


@pytest.mark.parametrize("head_dim", HEAD_SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_sizes(backend, head_dim):
    check(Case(backend=backend, head_dim=head_dim))


@pytest.mark.parametrize("heads", HEAD_RATIOS)
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


def test_pieces_of_sdpa(monkeypatch):
    """Long chunks and large groups are cut into pieces; the cuts do not show."""
    from hpcinfer.attention import sdpa

    monkeypatch.setattr(sdpa, "_MASK_ELEMENTS", 64)
    monkeypatch.setattr(sdpa, "_GROUP_ELEMENTS", 4000)
    for window in (None, 5):
        check(Case(window=window))
        check(Case(window=window, sinks=True))
        check(Case(batch="uneven decode", window=window))


@pytest.mark.parametrize("window", [None, 5, 200])
def test_several_blocks_of_a_flex_mask(window):
    """Queries and keys of more than one block of the mask, entries that begin inside one. Without compilation torch looks at the
    mask alone, so its blocks are held against those that torch finds by itself."""
    case = Case(backend="FLEX_ATTENTION", lens=([100, 1, 150, 0, 1, 20], [30, 400, 0, 7, 128, 300]), window=window)
    check(case)
    metadata = build_metadata(case.microbatch(), case.block_size, CPU)
    mask = flex._plan(metadata, window).mask
    found = create_block_mask(mask.mask_mod, None, None, *mask.seq_lengths, device="cpu", BLOCK_SIZE=flex._BLOCK)
    assert mask.to_dense().shape[-2:] == (3, len(found.to_dense()[0, 0, 0]))
    assert torch.equal(mask.to_dense(), found.to_dense())


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
