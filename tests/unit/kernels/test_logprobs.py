"""Log-probabilities from whole and from split vocabularies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpcinfer.kernels import logprobs as module
from hpcinfer.kernels.logprobs import join_shards, reduce_shard, token_logprobs, unpacked
from hpcinfer.layers.shard import part_range


def logits_of(rows: int, vocab: int, *, ties: bool) -> torch.Tensor:
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rows * vocab)) * 5
    return logits.round() if ties else logits


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("rows", "vocab", "num_top"), [(1, 7, 0), (5, 300, 3), (40, 64, 64), (3, 1, 1)])
def test_equal_log_softmax(rows, vocab, num_top, ties, monkeypatch):
    logits = logits_of(rows, vocab, ties=ties)
    tokens = torch.arange(rows) % vocab
    expected = torch.log_softmax(logits.double(), dim=-1).numpy()
    # Ranked by probability, then by token id.
    order = np.argsort(-logits.numpy(), axis=1, kind="stable")[:, :num_top]
    whole = token_logprobs(logits, tokens, num_top)
    found = unpacked(whole.numpy())
    assert (found.chosen.dtype, found.top.dtype, found.top_ids.dtype) == (np.float32, np.float32, np.int32)
    np.testing.assert_allclose(found.chosen, expected[np.arange(rows), tokens.numpy()], rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(found.top_ids, order)
    np.testing.assert_allclose(found.top, np.take_along_axis(expected, order, 1), rtol=1e-6, atol=1e-7)
    monkeypatch.setattr(module, "_VALUES_AT_ONCE", 2 * vocab)
    assert torch.equal(token_logprobs(logits, tokens, num_top), whole), "it depends on how many rows are taken at a time"
    for num_ranks in (2, 3, 8):  # the last ranks have fewer columns, or none
        ranges = [part_range(vocab, num_ranks, rank) for rank in range(num_ranks)]
        shards = [reduce_shard(logits[:, a:b], tokens, start=a, num_top=num_top) for a, b in ranges]
        split = unpacked(join_shards(torch.stack(shards), num_top).numpy())
        np.testing.assert_array_equal(split.top_ids, order)
        np.testing.assert_allclose(split.chosen, found.chosen, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(split.top, found.top, rtol=1e-6, atol=1e-7)


def test_half_precision_and_extremes():
    logits = torch.tensor([[3e4, -3e4, 0.0, -0.0], [float("nan"), 0.0, 0.0, 0.0], [-1e-30, 1e-30, 0.0, 0.0]])
    found = unpacked(token_logprobs(logits, torch.tensor([1, 0, 0]), 4).numpy())
    assert found.chosen[0] == -6e4 and np.isnan(found.chosen[1])
    assert found.top_ids[0].tolist() == [0, 2, 3, 1] and found.top_ids[2].tolist() == [1, 2, 3, 0]
    half = unpacked(token_logprobs(torch.tensor([[1.5, 1.5, 2.0]], dtype=torch.bfloat16), torch.tensor([1]), 2).numpy())
    assert half.top_ids.tolist() == [[2, 0]]
    np.testing.assert_allclose(half.chosen, np.log(1 / (2 + np.exp(0.5))), rtol=1e-6)
