"""Masks: filled beside the step, in the order of the steps, applied to the rows that have a constraint and to no other."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from hpcinfer.request import END_WITHOUT_TOKEN, NO_TOKEN_LEFT, NOT_A_TOKEN, Request, SamplingParams
from hpcinfer.sampling.masks import Matching, TokenMasks
from hpcinfer.sampling.sampler import SamplingBatch, sample
from tests.unit.sampling.test_grammar import EOS, demo_grammars

CPU = torch.device("cpu")
PROMPT = list(b"x")


@pytest.fixture
def masks():
    masks = TokenMasks(demo_grammars(), CPU)
    yield masks
    masks.close()


def request(row: int = 0, **sampling) -> Request:
    return Request(row=row, prompt_token_ids=np.array(PROMPT, np.int32), sampling=SamplingParams(**sampling))


def matching(**sampling) -> Matching:
    return Matching(request(**sampling))


def allowed(pending, rows: int = 1) -> list[list[int]]:
    logits = torch.zeros(rows, 263)
    pending.apply(logits)
    return [row.isfinite().nonzero()[:, 0].tolist() for row in logits]


def test_rows_without_a_constraint_stay_as_they_are(masks):
    logits = torch.randn(4, 263, generator=torch.Generator().manual_seed(1))
    pending = masks.start(
        [(None, PROMPT), (matching(structured_regex="a|b"), PROMPT), (None, PROMPT), (matching(structured_choice=("c",)), PROMPT)]
    )
    masked = logits.clone()
    pending.apply(masked)
    assert torch.equal(masked[[0, 2]], logits[[0, 2]])
    assert masked[1].isfinite().nonzero()[:, 0].tolist() == [ord("a"), ord("b")]
    assert masked[1, ord("a")] == logits[1, ord("a")]
    assert masked[3].isfinite().nonzero()[:, 0].tolist() == [ord("c")]
    assert masks.start([(None, PROMPT)]) is None


def test_a_matching_goes_on_from_whatever_is_known(masks):
    """Token by token, or with the tokens of an earlier life at once: the same mask."""
    stepwise, at_once = matching(structured_regex="(ab|cd)*e"), matching(structured_regex="(ab|cd)*e")
    output = list(b"abcdc")
    for count in range(len(output)):
        last = masks.start([(stepwise, PROMPT + output[: count + 1])])
    assert allowed(last) == allowed(masks.start([(at_once, PROMPT + output)])) == [[ord("d")]]


def test_masks_are_filled_while_the_step_computes_and_in_the_order_of_steps(masks, monkeypatch):
    go_on, real, thread = threading.Event(), masks._grammars.fill, []

    def slow(matchers, words):
        if threading.current_thread().name != "grammar":  # which compiles
            thread.append(threading.get_ident())
        assert go_on.wait(20)
        return real(matchers, words)

    monkeypatch.setattr(masks._grammars, "fill", slow)
    one = matching(structured_regex="ab")
    first = masks.start([(one, PROMPT)])
    second = masks.start([(one, [*PROMPT, ord("a")])])
    assert not first.done() and not second.done()
    go_on.set()
    assert allowed(second) == [[ord("b")]] and allowed(first) == [[ord("a")]]
    assert set(thread) != {threading.get_ident()} and len(set(thread)) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3, "top_p": 0.9, "min_p": 0.05}])
def test_draws_are_allowed_tokens_and_do_not_depend_on_the_batch(masks, temperature, filters):
    regexes = ["[a-f]", "(yes|no)", "[0-9]{3}", "é"]
    requests = [request(row, temperature=temperature, structured_regex=regexes[row % 4], **filters) for row in range(40)]
    requests += [request(row, temperature=temperature, **filters) for row in range(40, 60)]
    logits = torch.randn(60, 263, generator=torch.Generator().manual_seed(3)) * 3

    def draw(rows):
        pending = masks.start([(Matching(r) if r.sampling.constraint else None, PROMPT) for r in (requests[i] for i in rows)])
        return sample(logits[rows], SamplingBatch.of([(requests[i], 1) for i in rows], masks=pending)).tolist()

    tokens = draw(list(range(60)))
    assert tokens == [draw([row])[0] for row in range(60)]
    firsts = ["abcdef", "yn", "0123456789", "é"]
    assert all(token in firsts[row % 4].encode() for row, token in enumerate(tokens[:40]))
    assert len(set(tokens[:40:4])) > 1


def test_what_stands_in_the_place_of_a_token(masks):
    stuck = (matching(structured_regex="a"), [*PROMPT, ord("z")])
    complete = (matching(structured_regex="a", ignore_eos=True), [*PROMPT, ord("a")])
    ends = (matching(structured_regex="a"), [*PROMPT, ord("a")])
    requests = [request(0), *(each[0].request for each in (stuck, complete, ends)), request(4)]
    pending = masks.start([(None, PROMPT), stuck, complete, ends, (None, PROMPT)])
    logits = torch.zeros(5, 263)
    logits[4] = torch.nan
    tokens = sample(logits, SamplingBatch.of([(r, 2) for r in requests], masks=pending))
    assert tokens.tolist() == [0, NO_TOKEN_LEFT, END_WITHOUT_TOKEN, EOS, NOT_A_TOKEN]


def test_an_error_of_the_thread_is_the_rank_s(masks, monkeypatch):
    def fails(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(masks._grammars, "fill", fails)
    pending = masks.start([(matching(structured_regex="a"), PROMPT)])
    with pytest.raises(MemoryError, match="no room"):
        pending.apply(torch.zeros(1, 263))
