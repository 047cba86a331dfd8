"""How many tokens a step takes, so that the steps in flight cost about the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from hpcinfer.scheduler.lanes import LanePages
from hpcinfer.scheduler.limits import SchedulerLimits
from hpcinfer.scheduler.sequence import Sequence

_LEAST_SHARE = 8
"""A step has room for at least 1/8 of `max_batch_tokens` of prefill: the last chunks must not get ever smaller."""


def share(count: int, limits: SchedulerLimits) -> int:
    """An equal share, rounded up, of `count` for each step in flight: it keeps every stage busy."""
    return -(-count // limits.num_in_flight)


def step_tokens(
    limits: SchedulerLimits,
    pages: LanePages,
    *,
    in_flight: int,
    num_ready: int,
    prefilling: Iterable[Sequence],
    waiting: Iterable[Sequence],
    room: int,
) -> int:
    """Most tokens that a lane computes in this step: of all that there is to do or in flight, an equal share.

    What is in flight counts too: else each step would take a share of what the last one left, and steps would dwindle.

    Args:
        in_flight: tokens of the steps before that are in flight, each in its fullest lane.
        num_ready: decodes that compete for the tokens.
        prefilling: running sequences whose prefill is not complete.
        waiting: sequences to be admitted, first come first.
        room: how many of them may be.
    """
    most, num_lanes = limits.max_batch_tokens, limits.num_lanes
    if limits.num_in_flight == 1:
        return most
    local, spread = [0] * num_lanes, 0
    for sequence in prefilling:
        if sequence.is_shared:
            spread += sequence.num_to_compute
        else:
            local[sequence.owner] += sequence.num_to_compute
    num_free = pages.num_free
    for sequence in itertools.islice(waiting, room):
        num_tokens = len(sequence.tokens)
        num_free -= pages.blocks_for(num_tokens) * (num_lanes if is_shared(num_tokens, limits) else 1)
        if num_free < 0 or spread >= limits.num_in_flight * most * num_lanes:
            break
        spread += num_tokens
    pending = num_ready + max(local) - (-spread // num_lanes)
    least = share(num_ready, limits) + max(1, most // _LEAST_SHARE)
    return min(max(share(in_flight + pending, limits), least), most)


def is_shared(num_tokens: int, limits: SchedulerLimits) -> bool:
    """Whether a prefill of `num_tokens` tokens is spread over the lanes."""
    return limits.num_lanes > 1 and num_tokens >= limits.sp_min_tokens
