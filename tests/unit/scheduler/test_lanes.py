"""Lanes, steps of two parts and several steps in flight, in all combinations, against simulated pages."""

from __future__ import annotations

import collections
import dataclasses
import itertools

import numpy as np
import pytest

from hpcinfer.batch import MicroBatch
from hpcinfer.request import FinishReason, Request
from hpcinfer.scheduler.limits import SchedulerLimits
from hpcinfer.scheduler.scheduler import Scheduler
from tests.unit.scheduler.simulation import (
    SimulatedReplica, check_empty, limits, reference, request, run, token_positions,
)

LONGEST = 75
AHEAD = 0
"""In the place of a lag: one step in flight, and the next one before its tokens are known."""


def workload(seed: int, lanes: int, lag: int, two_batch: bool) -> tuple[SchedulerLimits, list[Request], int]:
    """Limits, requests and how many of them come in one tick: prompts of all lengths, or (even seeds) short prompts
    with long answers, that outgrow the pages. Some are the partial rows of an earlier life. `lag` may be AHEAD."""
    rng = np.random.default_rng((seed, lanes, lag, two_batch))
    outgrows = seed % 2 == 0
    block_size = int(rng.choice([1, 3, 4, 8]))
    tight = -(-LONGEST // block_size)  # the longest sequence alone fills a lane
    chosen = limits(
        num_lanes=lanes, lag=2 if lag == AHEAD else lag, run_ahead=lag == AHEAD, block_size=block_size,
        num_blocks=1 + int(tight * rng.choice([1.0, 1.2, 1.6])),
        max_batch_tokens=int(rng.choice([5, 16, 40])),
        max_sequences=100 if outgrows else int(rng.integers(2, 5 + 5 * lanes)),
        sp_min_tokens=5 if outgrows else int(rng.choice([0, 8, 20])),
        two_batch_tokens=int(rng.choice([1, 2, 7])) if two_batch else 0,
    )
    requests = []
    for row in range(6 + 3 * lanes):
        length = int(rng.choice([rng.integers(1, 6), rng.integers(5, 12 if outgrows else 45)]))
        max_tokens = int(rng.integers(30, 60) if outgrows else rng.integers(1, 30))
        # A third of them draw by what came before, and wait for it also when running ahead; others have stop texts.
        kind = ({}, {"presence_penalty": 0.5}, {} if outgrows else {"stop": "x"})[row // 2 % 3]
        wanted = request(row // 2, length, max_tokens=max_tokens, ignore_eos=outgrows or bool(rng.integers(2)), **kind)
        earlier = reference(wanted)[:-1][: int(rng.integers(0, 8)) * int(rng.integers(2))]
        output = np.array(earlier, np.int32)
        requests.append(dataclasses.replace(wanted, row=row, sample=row % 2, output_token_ids=output))
    return chosen, requests, int(rng.integers(1, 8))


COMBINATIONS = list(itertools.product((1, 2, 3, 4), (AHEAD, 1, 2, 3, 4), (False, True)))
STANDING = [
    (1, 1, True), (1, 2, False), (1, 3, True), (2, 1, False), (2, 2, True), (2, 4, False), (3, 1, True), (3, 3, False),
    (4, 1, False), (4, 2, True), (1, AHEAD, True), (2, AHEAD, False), (3, AHEAD, True),
]
CASES = [
    *[pytest.param(*case, (0, 1), id="{}-{}-{}".format(*case)) for case in STANDING],
    *[
        pytest.param(*case, (2, 3), id="{}-{}-{}-more".format(*case), marks=pytest.mark.full)
        for case in COMBINATIONS
    ],
]


@pytest.mark.parametrize(("lanes", "lag", "two_batch", "seeds"), CASES)
def test_every_sequence_gets_the_tokens_of_the_model(lanes, lag, two_batch, seeds):
    seen, step_sizes = collections.Counter(), []
    for seed in seeds:
        chosen, requests, at_once = workload(seed, lanes, lag, two_batch)
        replica = SimulatedReplica(chosen)
        for wanted in requests:
            replica.scheduler.refuse(wanted)
        ended = run(replica, requests, at_once)
        for wanted in requests:
            assert ended[wanted.row].output_token_ids.tolist() == reference(wanted)
            assert ended[wanted.row].reason is not FinishReason.NONE
        check_empty(replica)
        assert replica.scheduler.counters == replica.schedulers[-1].counters
        for steps in replica.steps:
            check_balance(steps)
            check_kinds(replica, steps)
        step_sizes.append(chosen.max_batch_tokens)
        seen.update(dataclasses.asdict(replica.scheduler.counters))
    wanted = {"preemptions", "prefill_tokens", "decode_tokens", "decode_microbatches"}
    wanted |= {"chunked_prefills"} if min(step_sizes) < LONGEST // 4 else set()
    sharing = {"shared_prefills", "shared_tokens", "local_prefills_under_sp", "empty_lane_steps"}
    dividing = {"divided_steps", "divided_prompts"}
    wanted |= sharing if lanes > 1 else set()
    wanted |= dividing if two_batch else set()
    ahead = {"tokens_ahead", "dropped_tokens"}
    wanted |= ahead if lag == AHEAD else set()
    assert not [name for name in wanted if seen[name] == 0]
    assert not [name for name in (sharing | dividing | ahead) - wanted if seen[name] > 0]


def shared_pieces(parts: tuple[MicroBatch, ...]) -> dict[int, list[np.ndarray]]:
    """Of every sequence that is spread over the lanes in one part of a step: for each lane its positions."""
    pieces: dict[int, list[np.ndarray]] = collections.defaultdict(lambda: [np.empty(0, np.int64) for _ in parts])
    for lane, batch in enumerate(parts):
        positions, entries = token_positions(batch)
        for index, sequence_id in enumerate(batch.sequence_ids):
            num_shared = batch.shared_lens[lane] if batch.shared_lens else 0
            mine = (entries == index) & (np.arange(batch.num_tokens) < num_shared)
            if mine.any():
                pieces[sequence_id][lane] = np.concatenate((pieces[sequence_id][lane], positions[mine]))
    return pieces


def check_balance(steps) -> None:
    """A shared piece is spread evenly, and each of its tokens is computed by one lane."""
    for parts in zip(*(step.parts for step in steps), strict=True):
        for lanes in shared_pieces(parts).values():
            counts = [len(positions) for positions in lanes]
            assert max(counts) - min(counts) <= 2
            everyone = np.sort(np.concatenate(lanes))
            np.testing.assert_array_equal(everyone, np.arange(everyone[0], everyone[-1] + 1))


def check_kinds(replica: SimulatedReplica, steps) -> None:
    """With several lanes a step is all prefill or all decode. Parts of a lane have about the same number of tokens."""
    if replica.limits.num_lanes > 1:
        assert len({part.is_prefill for step in steps for part in step.parts}) == 1
    if len(steps[0].parts) == 2:
        for step in steps:
            first, second = (part.num_tokens for part in step.parts)
            assert abs(first - second) <= 2 * replica.limits.num_lanes + 1


@pytest.mark.parametrize("lanes", [2, 3, 4, 8])
@pytest.mark.parametrize("two_batch_tokens", [0, 2])
def test_every_lane_of_a_long_prompt_has_the_same_work(lanes, two_batch_tokens):
    replica = SimulatedReplica(
        limits(
            num_lanes=lanes, max_batch_tokens=160 // lanes, num_blocks=120, max_context=420,
            two_batch_tokens=two_batch_tokens,
        )
    )
    run(replica, [request(0, 400, max_tokens=3, ignore_eos=True), request(1, 77, max_tokens=3, ignore_eos=True)])
    checked = 0
    for steps in replica.steps:
        for parts in zip(*(step.parts for step in steps), strict=True):
            for lane_positions in shared_pieces(parts).values():
                costs = [int((positions + 1).sum()) for positions in lane_positions]
                if sum(map(len, lane_positions)) >= 64:
                    mean = sum(costs) / lanes
                    assert 0.9 * mean <= min(costs) <= max(costs) <= 1.1 * mean
                    checked += 1
    assert checked >= 4 and replica.scheduler.counters.shared_prefills == 2


def test_only_the_owner_keeps_the_pages_of_a_prefill_that_is_complete():
    replica = SimulatedReplica(limits(num_lanes=2, lag=2, num_blocks=11))
    replica.step([request(0, 38, max_tokens=2, ignore_eos=True)])
    pages = replica.scheduler.pages
    assert [lane.num_free + lane.num_resting for lane in pages.lanes] == [0, 0], "all lanes hold all of it"
    replica.step()
    sequence = replica.scheduler.sequence(0)
    owner = sequence.owner
    assert [len(table) for table in sequence.tables] == [10 * (lane == owner) for lane in range(2)]
    assert pages.lanes[1 - owner].num_free == 0 and pages.lanes[1 - owner].num_resting == 10
    replica.step()
    assert pages.lanes[1 - owner].num_free == 0, "the step in flight still uses them"
    replica.step()
    assert pages.lanes[1 - owner].num_free == 10


def test_short_prompts_stay_on_their_lane_and_lanes_fill_evenly():
    replica = SimulatedReplica(limits(num_lanes=4, sp_min_tokens=30, num_blocks=200))
    run(replica, [request(row, 6, max_tokens=20, ignore_eos=True) for row in range(16)])
    assert replica.scheduler.counters.local_prefills_under_sp == 16
    assert replica.scheduler.counters.shared_prefills == 0
    assert all(part.shared_lens == () for steps in replica.steps for step in steps for part in step.parts)
    decodes = [steps[0].parts[0] for steps in replica.steps if not steps[0].parts[0].is_prefill]
    assert decodes and {batch.lane_tokens for batch in decodes} == {(4, 4, 4, 4)}


def test_long_prompts_are_owned_evenly():
    replica = SimulatedReplica(limits(num_lanes=4, max_batch_tokens=33, num_blocks=200))
    run(replica, [request(row, 10, max_tokens=20, ignore_eos=True) for row in range(16)])
    decodes = [steps[0].parts[0] for steps in replica.steps if not steps[0].parts[0].is_prefill]
    assert decodes and {batch.lane_tokens for batch in decodes} == {(4, 4, 4, 4)}


def test_a_starved_decode_is_not_overtaken_by_those_preempted_for_it():
    """Its lane takes no sequence until it has its page; else victims come back, take it, and are preempted again."""
    replica = SimulatedReplica(
        limits(num_lanes=2, lag=2, num_blocks=13, sp_min_tokens=1000, max_sequences=8, max_context=49)
    )
    replica.step([request(row, 12, max_tokens=36, ignore_eos=True) for row in range(2)])
    crowd = [request(row, 11, max_tokens=12, ignore_eos=True) for row in range(2, 40)]
    ended = run(replica, crowd, at_once=1)
    assert len(ended) == 40 and 0 < replica.scheduler.counters.preemptions < 40
    assert all(ended[row].output_token_ids.tolist() == reference(ended[row].request, 49) for row in range(40))
    check_empty(replica)


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_a_drain_in_the_middle_of_shared_prefills_loses_no_page(lanes):
    for ticks in (1, 3, 6):
        replica = SimulatedReplica(limits(num_lanes=lanes, lag=2, max_batch_tokens=9, two_batch_tokens=2))
        requests = [request(row, 33, max_tokens=9, ignore_eos=True) for row in range(6)]
        for tick in range(ticks):
            assert not replica.step(requests if tick == 0 else [])
        partial = replica.step(drain=True)
        assert len(partial) == 6 and all(sequence.is_cut_short for sequence in partial)
        for _ in range(3):
            assert not replica.step()
        check_empty(replica)
        resumed = [dataclasses.replace(p.request, output_token_ids=p.output_token_ids) for p in partial]
        ended = run(SimulatedReplica(replica.limits), resumed)
        assert [ended[wanted.row].output_token_ids.tolist() for wanted in requests] == [reference(r) for r in requests]


def test_decisions_do_not_depend_on_the_lane():
    chosen = limits(num_lanes=3)
    assert len({Scheduler(chosen, lane).state_hash() for lane in range(3)}) == 1
