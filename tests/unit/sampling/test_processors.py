"""Logits processors against those of transformers, and against the formulas of vLLM where transformers has none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcinfer.request import NO_TOKEN_LEFT, NOT_A_TOKEN, Request, SamplingParams
from hpcinfer.sampling.history import History
from hpcinfer.sampling.processors import Draw, edits_of
from hpcinfer.sampling.sampler import SamplingBatch, sample
from tests.processors import by_transformers

VOCAB = 12
EOS = 3
IDS = st.integers(0, VOCAB - 1)

ROWS = st.fixed_dictionaries(
    {
        "prompt": st.lists(IDS, min_size=1, max_size=8),
        "output": st.lists(IDS, max_size=8),
        "bad_words": st.lists(st.lists(IDS, min_size=1, max_size=3).map(tuple), max_size=5, unique=True),
        "sampling": st.fixed_dictionaries(
            {},
            optional={
                "repetition_penalty": st.floats(0.3, 3.0),
                "presence_penalty": st.floats(-2.0, 2.0),
                "frequency_penalty": st.floats(-2.0, 2.0),
                "logit_bias": st.dictionaries(IDS, st.floats(-9.0, 9.0, width=32) | st.just(-math.inf), max_size=4),
                "min_tokens": st.integers(0, 10),
                "stop_token_ids": st.lists(IDS, max_size=2),
            },
        ),
    }
)


def request_of(row: dict) -> Request:
    return Request(
        row=0, prompt_token_ids=np.array(row["prompt"], np.int32), sampling=SamplingParams(**row["sampling"]),
        bad_words_token_ids=tuple(row["bad_words"]),
    )


def draw_of(request: Request, output: list[int], *, pieces: int = 1) -> Draw:
    """The draw after `output`, of which the sampler was told in `pieces` pieces; as its rank makes it."""
    tokens = [*request.prompt_token_ids.tolist()]
    history = History(request)
    for start in range(0, len(output), max(1, len(output) // pieces)):
        history.advance(tokens)
        tokens = [*tokens, *output[start : start + max(1, len(output) // pieces)]]
    history.advance(tokens)
    return Draw(request, len(tokens), history)


def edited(logits: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    logits = logits.clone()
    for edit in edits_of(draws, frozenset({EOS})):
        edit.apply(logits)
    return logits


@settings(max_examples=150)
@given(rows=st.lists(ROWS, min_size=1, max_size=4), seed=st.integers(0, 2**31), pieces=st.integers(1, 4))
def test_edited_logits_are_those_of_transformers(rows, seed, pieces):
    """In one batch, whatever the other rows ask for, however the tokens came."""
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    got = edited(logits, [draw_of(request_of(row), row["output"], pieces=pieces) for row in rows])
    for number, row in enumerate(rows):
        wanted = by_transformers(logits[number : number + 1], row["prompt"], row["output"], row, ends=[EOS])[0]
        assert torch.equal(got[number], wanted)


def test_tokens_of_an_earlier_life_are_output():
    sampling = SamplingParams(presence_penalty=1.0, frequency_penalty=0.5)
    request = Request(
        row=0, prompt_token_ids=np.array([1, 2], np.int32), sampling=sampling, output_token_ids=np.array([5, 5], np.int32)
    )
    history = History(request)
    history.advance([1, 2, 5, 5, 6])
    got = edited(torch.zeros(1, VOCAB), [Draw(request, 5, history)])[0]
    assert got.nonzero()[:, 0].tolist() == [5, 6] and got[[5, 6]].tolist() == [-2.0, -1.5]


def test_rows_that_ask_for_nothing_cost_nothing_and_stay_as_they_are():
    plain, biased = (Request(row=0, prompt_token_ids=np.ones(1, np.int32), sampling=SamplingParams(logit_bias=bias)) for bias in ({}, {4: 50}))
    assert not plain.edits_logits and biased.edits_logits
    assert SamplingBatch.of([(plain, 1)] * 3).edits == ()
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    tokens = sample(logits, SamplingBatch.of([Draw(plain, 1), draw_of(biased, []), Draw(plain, 1)]))
    assert tokens.tolist() == [logits[0].argmax(), 4, logits[2].argmax()] and torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_k", [0, 3])
def test_a_row_without_a_token_left_fails_alone_and_a_broken_one_is_told_from_it(temperature, top_k):
    everything = {token: -math.inf for token in range(VOCAB)}
    kinds = ({"logit_bias": everything}, {"logit_bias": {2: 50.0}}, {"logit_bias": everything}, {"min_tokens": 3})
    requests = [
        Request(row=row, prompt_token_ids=np.ones(1, np.int32), sampling=SamplingParams(temperature=temperature, top_k=top_k, **kind))
        for row, kind in enumerate(kinds)
    ]
    logits = torch.zeros(4, VOCAB)
    logits[2, 5] = torch.nan
    logits[3, EOS] = 99.0
    tokens = sample(logits, SamplingBatch.of([draw_of(request, []) for request in requests], frozenset({EOS}))).tolist()
    assert tokens[:3] == [NO_TOKEN_LEFT, 2, NOT_A_TOKEN] and tokens[3] not in (EOS, NO_TOKEN_LEFT, NOT_A_TOKEN)


def test_ids_that_no_token_can_have_are_left_out():
    """End-of-sequence ids and tokens of a tokenizer may lie outside a model's vocabulary."""
    sampling = SamplingParams(min_tokens=5, stop_token_ids=(VOCAB + 3, 1))
    request = Request(
        row=0, prompt_token_ids=np.ones(1, np.int32), sampling=sampling, bad_words_token_ids=((VOCAB,), (7, VOCAB + 1))
    )
    got = edited(torch.zeros(1, VOCAB), [draw_of(request, [7])])
    assert torch.isinf(got[0]).nonzero()[:, 0].tolist() == [1, EOS]


@pytest.mark.parametrize(
    ("sampling", "bad_words", "needs"),
    [
        ({}, (), False), ({"repetition_penalty": 1.1}, (), True), ({"presence_penalty": -0.1}, (), True),
        ({"frequency_penalty": 0.1}, (), True), ({"min_tokens": 3, "logit_bias": {1: 2.0}}, (), False), ({"stop": "x"}, (), False),
        ({}, ((4,), (5,)), False), ({}, ((4,), (5, 6)), True),
    ],
)
def test_what_waits_for_the_tokens_before(sampling, bad_words, needs):
    request = Request(
        row=0, prompt_token_ids=np.ones(1, np.int32), sampling=SamplingParams(**sampling), bad_words_token_ids=bad_words
    )
    assert request.needs_history is needs
