"""What is read beside logits: every token of a prompt once, however it is cut into chunks, parts and lanes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.request import Request, SamplingParams, TaskParams
from hpcinfer.scheduler.microbatch import build_step
from hpcinfer.scheduler.sequence import Sequence
from hpcinfer.scheduler.work import Piece, Work, divide


def sequence(number: int, num_tokens: int, task: str = "generate", score_from: int = 1, **sampling) -> Sequence:
    request = Request(
        row=number, prompt_token_ids=np.arange(num_tokens, dtype=np.int32) + 100 * number, sampling=SamplingParams(**sampling),
        task=TaskParams(kind=task, pooling="mean"), score_from=score_from,
    )
    made = Sequence(number, request, num_lanes=2)
    for table in made.tables:
        table.extend(range(1, num_tokens + 1))
    made.prefill_end = num_tokens
    return made


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.booleans(), st.booleans(), st.integers(1, 12))
def test_every_token_is_read_once(chunks, shared, divided, score_from):
    num_tokens = sum(chunks) + 1
    scored, embedded = sequence(1, num_tokens, "score", score_from, prompt_logprobs=None), sequence(2, num_tokens, "embed")
    found, start, summed = {}, 0, []
    for tick, length in enumerate([*chunks, 1]):
        pieces = [Piece(one, start, length, start + length == num_tokens) for one in (scored, embedded)]
        work = Work(pieces, [[], []]) if shared else Work([], [[pieces[0]], [pieces[1]]])
        parts = divide(work) if divided else (work,)
        steps = [build_step(parts, lane, tick=tick, block_size=1) for lane in range(2)]
        assert steps[0].scored == steps[1].scored and steps[0].pooled == steps[1].pooled
        for lane, step in enumerate(steps):
            readings = [part.reading for part in step.parts if part.reading is not None]
            targets = np.concatenate([np.empty(0, np.int64), *[reading.targets[reading.targets >= 0] for reading in readings]])
            expected = [span for span in step.scored[lane]] if step.scored else []
            places = [place for span in expected for place in range(span.start, span.stop)]
            assert targets.tolist() == [100 + place for place in places]
            for place in places:
                assert place not in found, "scored twice"
                found[place] = tick
            pools = [pool for reading in readings for pool in reading.pools]
            spans = step.pooled[lane] if step.pooled else ()
            assert [stop - first for first, stop in pools] == [span.num_tokens for span in spans]
            for span in spans:
                summed += range(span.start, span.stop)
        start += length
    assert sorted(found) == list(range(min(score_from, num_tokens), num_tokens)) and sorted(summed) == list(range(num_tokens))


def test_a_token_is_scored_where_the_one_before_it_is_computed():
    one = sequence(1, 6, prompt_logprobs=3)
    other = sequence(2, 4)
    work = Work([], [[Piece(other, 0, 4, True), Piece(one, 2, 4, True)], []])
    step = build_step((work,), 0, tick=0, block_size=1)
    assert step.parts[0].reading.targets.tolist() == [-1, -1, -1, -1, 103, 104, 105, -1]
    assert step.scored == (((1, 3, 6),), ()) and step.num_scored_top == 3 == step.parts[0].reading.num_top


@pytest.mark.parametrize("is_prefill", [True, False])
def test_steps_of_which_nothing_is_asked(is_prefill):
    one = sequence(1, 6, prompt_logprobs=None if is_prefill else 2)
    if not is_prefill:
        one.tokens.append(7)
    work = Work([], [[Piece(one, 0, 6, True) if is_prefill else Piece(one, 6, 1, True)], []])
    step = build_step((work,), 0, tick=0, block_size=1)
    assert step.parts[0].reading is None and step.scored == step.pooled == step.asked == ()


def test_drawn_tokens_that_are_asked_for():
    first, second, third = sequence(1, 2), sequence(2, 2, logprobs=4), sequence(3, 1, logprobs=0)
    work = Work([], [[Piece(first, 0, 2, True), Piece(second, 0, 2, True)], [Piece(third, 0, 1, True)]])
    step = build_step((work,), 0, tick=0, block_size=1)
    assert step.drawing == ((1, 2), (3,)) and step.asked == ((1,), (0,)) and step.num_asked_top == 4
