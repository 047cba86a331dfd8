"""The sampler against transformers' processors and against the distribution that it should draw from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hpcinfer.request import NOT_A_TOKEN, Request, SamplingParams
from hpcinfer.sampling.logits import probabilities
from hpcinfer.sampling.sampler import SamplingBatch, sample


def request(row: int, **sampling) -> Request:
    return Request(row=row, prompt_token_ids=np.ones(1, np.int32), sampling=SamplingParams(**sampling))


def filtered(logits: torch.Tensor, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> torch.Tensor:
    rows = len(logits)
    return probabilities(
        logits, temperature=np.full(rows, temperature), top_k=np.full(rows, top_k), top_p=np.full(rows, top_p),
        min_p=np.full(rows, min_p),
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.2), (9, 0.7, 0.1), (999, 0.001, 0.0)])
def test_filters_are_those_of_transformers(temperature, top_k, top_p, min_p):
    logits = torch.randn(40, 97, generator=torch.Generator().manual_seed(1)) * 3
    scores = TemperatureLogitsWarper(temperature)(None, logits.double())
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    expected = torch.softmax(scores, dim=-1)
    got = filtered(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    torch.testing.assert_close(got / got.sum(dim=-1, keepdim=True), expected, rtol=1e-9, atol=1e-12)


def test_greedy_and_drawn_rows_of_one_batch():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(2))
    requests = [request(row, temperature=0.0 if row % 2 else 1.0) for row in range(6)]
    tokens = sample(logits, SamplingBatch.of((r, 5) for r in requests))
    assert tokens[1::2].tolist() == logits.argmax(dim=-1)[1::2].tolist()
    alone = [sample(logits[row : row + 1], SamplingBatch.of([(requests[row], 5)])).item() for row in range(6)]
    assert tokens.tolist() == alone


def test_filters_of_one_row_do_not_touch_another():
    """Greedy and drawn rows, and rows with one filter or several, give together what each gives alone."""
    logits = torch.randn(60, 50, generator=torch.Generator().manual_seed(6)) * 2
    kinds = ({"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.4}, {"min_p": 0.3}, {"top_k": 20, "top_p": 0.7})
    requests = [request(row, **({"temperature": 1.3} | kinds[row % len(kinds)])) for row in range(60)]
    tokens = sample(logits, SamplingBatch.of((r, 5) for r in requests))
    alone = [sample(logits[row : row + 1], SamplingBatch.of([(requests[row], 5)])).item() for row in range(60)]
    assert tokens.tolist() == alone
    best = logits.topk(3).indices
    assert all(tokens[row] in best[row] for row in range(2, 60, 6))


def test_draws_follow_the_distribution():
    logits = torch.tensor([1.0, 2.0, 0.0, 3.0, 1.5]).expand(20_000, 5).contiguous()
    tokens = sample(logits, SamplingBatch.of((request(row, temperature=0.8, top_k=4), 3) for row in range(20_000)))
    expected = filtered(logits[:1], temperature=0.8, top_k=4)[0]
    share = torch.bincount(tokens, minlength=5) / 20_000
    assert share[2] == 0
    torch.testing.assert_close(share.double(), expected, rtol=0, atol=0.015)  # 4 standard deviations of the largest


@pytest.mark.parametrize("temperature", [1e-3, 1e-150, 1e-310, 5e-324])
def test_the_smallest_temperature_is_greedy(temperature):
    logits = torch.randn(50, 97, generator=torch.Generator().manual_seed(4)) * 5
    tokens = sample(logits, SamplingBatch.of((request(row, temperature=temperature), 3) for row in range(50)))
    assert tokens.tolist() == logits.argmax(dim=-1).tolist()


def test_a_uniform_at_either_end_draws_a_token_that_has_probability():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]] * 2)
    batch = SamplingBatch(
        temperature=np.ones(2), top_k=np.zeros(2, np.int64), top_p=np.ones(2), min_p=np.zeros(2),
        uniforms=np.array([0.0, 1 - 2.0**-53]),
    )
    assert sample(logits, batch).tolist() == [1, 3]


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}, {"temperature": 1.0, "top_p": 0.5, "min_p": 0.01}],
)
def test_logits_that_are_not_numbers_give_no_token_and_leave_the_other_rows_alone(sampling):
    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(3))
    batch = SamplingBatch.of((request(row, **sampling), 5) for row in range(4))
    good = sample(logits, batch)
    broken = logits.clone()
    broken[0, 7] = torch.nan
    broken[1, :] = -torch.inf
    broken[2, 3] = torch.inf
    assert sample(broken, batch).tolist() == [NOT_A_TOKEN, NOT_A_TOKEN, NOT_A_TOKEN, good[3].item()]
