"""Steps in flight that cost about the same."""

from __future__ import annotations

import pytest

from tests.unit.scheduler.simulation import SimulatedReplica, limits, reference, request, run


def prefill_sizes(replica: SimulatedReplica) -> list[int]:
    """Tokens of every step on lane 0 with prefill in it."""
    return [steps[0].num_tokens for steps in replica.steps if steps[0].parts[0].is_prefill]


def test_a_long_prompt_and_decodes_are_mixed_to_equal_steps():
    replica = SimulatedReplica(limits(lag=2, num_blocks=2000, max_batch_tokens=512, max_sequences=64, max_context=2000))
    short = [request(row, 4, max_tokens=60, ignore_eos=True) for row in range(40)]
    replica.step(short)
    for _ in range(9):
        replica.step()
    assert {steps[0].num_tokens for steps in replica.steps[-6:]} == {20}, "decodes alone, in equal halves"
    start, long = len(replica.steps), request(40, 700, max_tokens=2)
    ended = run(replica, [long])
    assert ended[40].output_token_ids.tolist() == reference(long, 2000)
    first, second, third = (steps[0].parts[0] for steps in replica.steps[start : start + 3])
    assert abs(first.num_tokens - second.num_tokens) <= 10, "the prompt in two steps of equal cost"
    for batch in (first, second):
        assert batch.num_tokens - batch.num_prefill_tokens == 20 and batch.num_prefill_tokens > 300
    assert not third.is_prefill and third.num_tokens <= 21


def test_a_longer_prompt_fills_whole_steps_and_ends_without_dwindling():
    replica = SimulatedReplica(limits(lag=3, num_blocks=2000, max_batch_tokens=64, max_sequences=64, max_context=2000))
    run(replica, [request(0, 700, max_tokens=2, ignore_eos=True)])
    sizes = prefill_sizes(replica)
    assert sizes[:9] == [64] * 9 and len(sizes) <= 12
    assert all(size >= 64 // 8 for size in sizes[:-1])


@pytest.mark.parametrize("lag", [1, 2, 3, 4])
def test_a_lone_prompt_is_spread_over_the_steps_in_flight(lag):
    replica = SimulatedReplica(limits(lag=lag, num_blocks=200, max_batch_tokens=400, max_sequences=8, max_context=500))
    run(replica, [request(0, 360, max_tokens=1)])
    assert prefill_sizes(replica) == [360 // lag] * lag


def test_a_short_prompt_is_not_cut():
    replica = SimulatedReplica(limits(lag=4, max_batch_tokens=64))
    run(replica, [request(0, 8, max_tokens=1)])
    assert prefill_sizes(replica) == [8]


@pytest.mark.parametrize("lanes", [2, 3])
def test_shared_prompts_are_spread_over_the_steps_in_flight(lanes):
    replica = SimulatedReplica(
        limits(lag=2, num_lanes=lanes, num_blocks=200, max_batch_tokens=400, max_sequences=8, max_context=500)
    )
    run(replica, [request(0, 360, max_tokens=1)])
    assert prefill_sizes(replica) == [180 // lanes] * 2


def test_prompts_that_find_no_pages_do_not_count():
    """Else the decodes in work would all go into one step, and the other steps in flight would be empty."""
    replica = SimulatedReplica(limits(lag=2, num_blocks=17, max_sequences=64))
    requests = [request(row, 3, max_tokens=5, ignore_eos=True) for row in range(60)]
    ended = run(replica, requests)
    assert len(ended) == 60
    full = [steps[0].num_tokens for steps in replica.steps[20:-20]]
    assert max(full) - min(full) <= 16
