"""Tokens that travel to their experts: both forms give the sum over all experts, whatever the ranks have to send."""

from __future__ import annotations

import pytest
import torch

from hpcinfer.comm.local import LocalCommunicator
from hpcinfer.parallel.expert import ExpertDispatch, expert_range, pack, unpack
from tests.unit.layers.lockstep import LockstepCommunicator, run_lockstep
from tests.unit.parallel.expert_cases import CASES, Tokens

FORMS = {"gathered": True, "exchanged": False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_sum_over_all_experts(case, form, dtype):
    tokens = Tokens(**CASES[case], dtype=dtype)
    ranks = [LockstepCommunicator(rank, tokens.size, "ep") for rank in range(tokens.size)]
    if tokens.size == 1:
        ranks = [LocalCommunicator("ep")]
    forwards = [tokens.forward(ep, gathered=FORMS[form]) for ep in ranks]
    log: list = []
    for rank, got in enumerate(run_lockstep(forwards, log)):
        tokens.check(rank, got)
    if tokens.size > 1:
        verbs = [verb for verb, *_ in log]
        assert verbs == (["all_gather", "reduce_scatter"] if FORMS[form] else ["all_to_all"] * 3)


def test_a_token_goes_once_to_a_rank():
    """Two of its three experts are on rank 1: it is sent there once, with all three, and nothing to rank 2."""
    sent = []

    class Spy(LockstepCommunicator):
        def _all_to_all(self, tensor, send_counts, recv_counts, label):
            sent.append((label, self.rank, send_counts))
            return super()._all_to_all(tensor, send_counts, recv_counts, label)

    seen = {}

    def compute(rank):
        def run(x, ids, weights):
            seen[rank] = (x.clone(), ids.tolist(), weights.tolist())
            return torch.zeros_like(x)
        return run

    x, nothing = torch.randn(1, 4), torch.zeros(0, 4)
    forwards = []
    for rank in range(3):
        own = x if rank == 0 else nothing
        ids, weights = torch.tensor([[0, 2, 3]])[: len(own)], torch.tensor([[0.5, 0.25, 0.125]])[: len(own)]
        dispatch = ExpertDispatch(Spy(rank, 3, "ep"), num_experts=6, label="e")
        forwards.append(dispatch.forward(own, ids, weights, compute(rank), rows=(1, 0, 0), gathered=False))
    run_lockstep(forwards)
    assert ("e dispatch", 0, [1, 1, 0]) in sent and ("e combine", 1, [1, 0, 0]) in sent
    for rank in (0, 1):
        assert torch.equal(seen[rank][0], x)
        assert seen[rank][1:] == ([[0, 2, 3]], [[0.5, 0.25, 0.125]])
    assert len(seen[2][0]) == 0


def test_padding_of_a_bucket_is_nobody():
    seen = {}

    def compute(rank):
        def run(x, ids, weights):
            seen[rank] = ids.tolist()
            return torch.zeros_like(x)
        return run

    forwards = []
    for rank, count in enumerate((2, 0)):
        dispatch = ExpertDispatch(LockstepCommunicator(rank, 2, "ep"), num_experts=2, label="e")
        ids = torch.ones(count, 1, dtype=torch.int64)
        forwards.append(
            dispatch.forward(torch.ones(count, 3), ids, torch.ones(count, 1), compute(rank), rows=(2, 0), gathered=True)
        )
    results = run_lockstep(forwards)
    assert seen[0] == seen[1] == [[1], [1], [-1], [-1]]
    assert [tuple(result.shape) for result in results] == [(2, 3), (0, 3)]


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_packing(dtype, count):
    wide = torch.promote_types(dtype, torch.float32)
    x, ids = torch.randn(count, 5).to(dtype), torch.randint(0, 300, (count, 3))
    weights = torch.rand(count, 3, dtype=wide)
    packed = pack(x, ids, weights)
    assert packed.dtype == torch.uint8 and packed.shape == (count, 5 * dtype.itemsize + 3 * (4 + wide.itemsize))
    for got, given in zip(unpack(packed, 5, dtype, wide), (x, ids, weights)):
        assert got.dtype == given.dtype and torch.equal(got, given)


@pytest.mark.parametrize("num_experts", [1, 2, 5, 7, 8, 128])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 48])
def test_experts_are_spread_evenly(num_experts, num_ranks):
    ranges = [expert_range(num_experts, num_ranks, rank) for rank in range(num_ranks)]
    assert [expert for start, end in ranges for expert in range(start, end)] == list(range(num_experts))
    held = [end - start for start, end in ranges]
    assert held == sorted(held, reverse=True) and max(held) - min(held) <= 1
