"""How the pieces of a step are spread over lanes and cut into two parts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.scheduler.sequence import Sequence
from hpcinfer.scheduler.work import Piece, Work, divide, drawing, goes_on, runs_of
from tests.unit.scheduler.simulation import request


def piece(number: int, start: int, num_tokens: int, *, draws: bool = False) -> Piece:
    sequence = Sequence(number, request(number, 5))
    sequence.prefill_end = 10**6
    return Piece(sequence, start, num_tokens, draws)


def test_the_runs_of_two_lanes_by_hand():
    whole = piece(0, 100, 16, draws=True)
    assert [run[1:] for run in runs_of(whole, 0, 2)] == [(100, 4, False), (112, 4, True)]
    assert [run[1:] for run in runs_of(whole, 1, 2)] == [(104, 8, False)]  # its two runs are neighbours
    assert [run[1:] for run in runs_of(piece(0, 7, 1, draws=True), 0, 2)] == [(7, 1, True)]
    assert runs_of(piece(0, 7, 1, draws=True), 1, 2) == []


@given(st.integers(1, 8), st.integers(1, 600), st.integers(0, 50))
def test_runs_are_balanced_and_complete(lanes, num_tokens, start):
    runs = [runs_of(piece(0, start, num_tokens, draws=True), lane, lanes) for lane in range(lanes)]
    counts = [sum(run.num_tokens for run in mine) for mine in runs]
    assert max(counts) == -(-num_tokens // lanes) and max(counts) - min(counts) <= 1
    assert sum(run.draws for mine in runs for run in mine) == 1
    assert all(len(mine) <= 2 and all(run.num_tokens > 0 for run in mine) for mine in runs)
    positions = [p for mine in runs for run in mine for p in range(run.start, run.start + run.num_tokens)]
    assert sorted(positions) == list(range(start, start + num_tokens))
    if num_tokens >= 64:
        costs = [sum(p + 1 for run in mine for p in range(run.start, run.start + run.num_tokens)) for mine in runs]
        tolerance = 1.2 * max(0.1, lanes / num_tokens)  # a tenth, or about one token of a lane
        assert np.ptp(costs) <= tolerance * np.mean(costs)


@given(
    st.integers(1, 4), st.lists(st.integers(1, 40), max_size=5),
    st.lists(st.lists(st.integers(1, 40), max_size=6), min_size=4, max_size=4),
)
def test_parts_are_complete_ordered_and_equal(lanes, shared, local):
    numbers = iter(range(100))
    work = Work(
        [piece(next(numbers), 3, n, draws=True) for n in shared if lanes > 1],
        [[piece(next(numbers), 0, n, draws=True) for n in sizes] for sizes in local[:lanes]],
    )
    totals = [work.tokens_of(lane) for lane in range(lanes)]
    if not any(totals):
        return
    parts = divide(work)
    assert (len(parts) == 2) == (max(totals) >= 2)
    for lane in range(lanes):
        tokens = [part.tokens_of(lane) for part in parts]
        own = sum(p.num_tokens for p in work.local[lane])
        assert own + sum(p.num_tokens // lanes for p in work.shared) <= sum(tokens)
        charged = own + sum(-(-p.num_tokens // lanes) for p in work.shared)
        assert sum(tokens) <= charged, "more than its budget was charged with"
        if len(parts) == 2 and not work.shared:
            assert tokens[0] - tokens[1] in (0, 1)
    for name in ("shared", *range(lanes)):
        before, after = (
            [p for part in found for p in (part.shared if name == "shared" else part.local[name])]
            for found in ((work,), parts)
        )
        assert len(after) - len(before) in (0, 1), "at most one is cut"
        assert [n for n, _ in tokens_in(before)] == [n for n, _ in tokens_in(after)]
        assert tokens_in(before) == tokens_in(after)
    cut = sum(len(part.pieces) for part in parts) - len(work.pieces)
    assert cut == 0 if len(parts) == 1 else goes_on(*parts) == (cut > 0)
    everyone = sorted(sequence.id for lane in drawing(parts) for sequence in lane)
    assert everyone == sorted(p.sequence.id for p in work.pieces), "each draws once"


def tokens_in(pieces: list[Piece]) -> list[tuple[int, int]]:
    return [(p.sequence.id, position) for p in pieces for position in range(p.start, p.start + p.num_tokens)]


@pytest.mark.parametrize("tokens", [2, 3, 100, 101])
def test_one_long_prompt_becomes_two_chunks_and_the_second_draws(tokens):
    first, second = divide(Work([], [[piece(0, 0, tokens, draws=True)]]))
    (before,), (after,) = first.local[0], second.local[0]
    assert before[1:] == (0, -(-tokens // 2), False) and after[1:] == (-(-tokens // 2), tokens // 2, True)
    assert goes_on(first, second)


def test_decodes_are_cut_between_sequences():
    first, second = divide(Work([], [[piece(number, 9, 1, draws=True) for number in range(5)]]))
    assert [len(part.local[0]) for part in (first, second)] == [3, 2] and not goes_on(first, second)
