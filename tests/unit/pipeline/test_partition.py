"""Layer splits: contiguous, complete, and with the least possible largest stage."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.pipeline.partition import explicit_split, split_layers


def largest(ranges, costs, first_extra, last_extra):
    sums = [sum(costs[layer] for layer in stage) for stage in ranges]
    sums[0] += first_extra
    sums[-1] += last_extra
    return max(sums)


def all_splits(num_layers, num_stages):
    for cuts in itertools.combinations(range(1, num_layers), num_stages - 1):
        bounds = [0, *cuts, num_layers]
        yield [range(a, b) for a, b in itertools.pairwise(bounds)]


@given(
    costs=st.lists(st.integers(1, 9), min_size=1, max_size=8), first_extra=st.integers(0, 20),
    last_extra=st.integers(0, 20), data=st.data(),
)
def test_no_other_split_is_better(costs, first_extra, last_extra, data):
    num_stages = data.draw(st.integers(1, len(costs)))
    ranges = split_layers(costs, num_stages, first_extra=first_extra, last_extra=last_extra)
    assert [layer for stage in ranges for layer in stage] == list(range(len(costs)))
    assert len(ranges) == num_stages and all(ranges)
    best = min(largest(split, costs, first_extra, last_extra) for split in all_splits(len(costs), num_stages))
    assert largest(ranges, costs, first_extra, last_extra) == best


def test_the_head_makes_the_last_stage_shorter():
    assert [len(stage) for stage in split_layers([1.0] * 36, 4, last_extra=3.0)] == [10, 10, 10, 6]
    assert [len(stage) for stage in split_layers([1.0] * 7, 3)] == [3, 3, 1]


def test_explicit_split():
    assert explicit_split([2, 3]) == [range(0, 2), range(2, 5)]
