"""Embedding and head split by vocabulary, for vocabularies that the ranks do not divide."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hpcinfer.kernels.logprobs import token_logprobs, unpacked
from hpcinfer.layers import embedding as embedding_module
from hpcinfer.layers.embedding import ParallelHead, VocabParallelEmbedding
from hpcinfer.parallel.segments import run_to_end
from hpcinfer.comm.local import LocalCommunicator
from hpcinfer.parallel.tensor import ReplicatedStream
from tests.unit.layers.lockstep import LockstepCommunicator, run_lockstep

CPU = torch.device("cpu")


@pytest.mark.parametrize("vocab", [211, 8, 5, 1])
@pytest.mark.parametrize("tp", [2, 3, 4, 7])
def test_embedding_and_head(tp, vocab):
    weight = torch.randn(vocab, 6, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(vocab).repeat(2)
    lookups, projections = [], []
    for rank in range(tp):
        place = {"dtype": torch.float32, "device": CPU}
        comm = LockstepCommunicator(rank, tp)
        embedding = VocabParallelEmbedding(vocab, 6, stream=ReplicatedStream(comm), **place)
        embedding.load_weight(weight)
        head = ParallelHead(vocab, 6, tied=embedding, tp=comm, **place)
        assert head.weight.data_ptr() == embedding.weight.data_ptr()
        lookups.append(embedding.forward(ids))
        projections.append(head.forward(weight))
    for hidden in run_lockstep(lookups):
        assert torch.equal(hidden, weight[ids])
    for logits in run_lockstep(projections):
        torch.testing.assert_close(logits, F.linear(weight, weight))


@pytest.mark.parametrize("vocab", [211, 5, 1])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_logprobs_of_a_split_head(tp, vocab, monkeypatch):
    weight = torch.randn(vocab, 6, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    tokens, num_top = torch.arange(9) % vocab, min(3, vocab)
    expected = unpacked(token_logprobs(F.linear(hidden, weight), tokens, num_top).numpy())
    monkeypatch.setattr(embedding_module, "_LOGITS_AT_ONCE", 2 * vocab)  # a few rows at a time
    forwards = []
    for rank in range(tp):
        comm = LockstepCommunicator(rank, tp) if tp > 1 else LocalCommunicator("tp")
        head = ParallelHead(vocab, 6, tp=comm, dtype=torch.float32, device=CPU)
        head.load_weight(weight)
        forwards.append(head.logprobs(hidden, tokens, num_top))
    for packed in run_lockstep(forwards) if tp > 1 else [run_to_end(forwards[0])]:
        found = unpacked(packed.numpy())
        torch.testing.assert_close(torch.from_numpy(found.chosen), torch.from_numpy(expected.chosen))
        torch.testing.assert_close(torch.from_numpy(found.top), torch.from_numpy(expected.top))
        assert (found.top_ids == expected.top_ids).all()


def test_one_rank_needs_no_transfer():
    place, comm = {"dtype": torch.bfloat16, "device": CPU}, LocalCommunicator("tp")
    embedding = VocabParallelEmbedding(11, 4, stream=ReplicatedStream(comm), **place)
    head = ParallelHead(11, 4, tp=comm, **place)
    full = torch.randn(11, 4)
    embedding.load_weight(full), head.load_weight(full)
    with pytest.raises(StopIteration):
        next(embedding.forward(torch.tensor([3])))
    logits = run_to_end(head.forward(full.bfloat16()))
    assert logits.dtype == torch.float32 and logits.shape == (11, 11)
