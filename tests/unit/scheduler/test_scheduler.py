"""The scheduler with one lane and undivided steps, against a simulated replica."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcinfer.errors import ConfigError, ReplicaDivergedError, RowError
from hpcinfer.request import NOT_A_TOKEN, FinishReason, Request
from hpcinfer.scheduler.message import TickMessage
from hpcinfer.scheduler.scheduler import Scheduler
from tests.unit.scheduler.simulation import EOS, SimulatedReplica, check_empty, limits, reference, request, run


AHEAD = {"lag": 2, "run_ahead": True}


@pytest.mark.parametrize("in_flight", [{"lag": 1}, {"lag": 2}, {"lag": 3}, AHEAD])
def test_every_sequence_gets_the_tokens_of_the_model(in_flight):
    replica = SimulatedReplica(limits(**in_flight))
    requests = [request(row, 1 + row * 3 % 37) for row in range(40)]
    ended = run(replica, requests)
    assert sorted(ended) == list(range(40))
    for wanted in requests:
        expected = reference(wanted, 100)
        assert ended[wanted.row].output_token_ids.tolist() == expected
        reason = FinishReason.STOP if expected[-1] == EOS else FinishReason.LENGTH
        assert ended[wanted.row].reason is reason
    check_empty(replica)


@pytest.mark.parametrize("in_flight", [{"lag": 1}, {"lag": 2}, {"lag": 3}, AHEAD])
def test_preemption_happens_and_changes_nothing(in_flight):
    replica = SimulatedReplica(limits(**in_flight, num_blocks=20))
    requests = [request(row, 5 + row % 7, max_tokens=40, ignore_eos=True) for row in range(12)]
    ended = run(replica, requests)
    assert replica.scheduler.counters.preemptions > 0
    for wanted in requests:
        assert ended[wanted.row].output_token_ids.tolist() == reference(wanted, 100)


def test_a_long_prompt_is_prefilled_in_chunks():
    replica = SimulatedReplica(limits(max_batch_tokens=8))
    ended = run(replica, [request(0, 50), request(1, 3)])
    assert replica.scheduler.counters.chunked_prefills >= 5
    assert ended[0].output_token_ids.tolist() == reference(request(0, 50), 100)
    assert ended[1].output_token_ids.tolist() == reference(request(1, 3), 100)


def test_with_a_lag_that_many_microbatches_are_in_flight_and_balanced():
    replica = SimulatedReplica(limits(lag=2, num_blocks=400))
    run(replica, [request(row, 4, max_tokens=20, ignore_eos=True) for row in range(16)])
    assert replica.scheduler.counters.max_in_flight == 2
    decodes = [batch for batch in replica.batches if batch.num_prefill_tokens == 0]
    assert {batch.num_entries for batch in decodes} == {8}


def test_a_sequence_is_never_in_two_microbatches_before_its_token_exists():
    replica = SimulatedReplica(limits(lag=3))
    run(replica, [request(row, 3, ignore_eos=True) for row in range(9)])
    last_drawn: dict[int, int] = {}
    for batch in replica.batches:
        for sequence_id, draws in zip(batch.sequence_ids, batch.samples, strict=True):
            assert batch.tick - last_drawn.get(sequence_id, -100) >= 3
            if draws:
                last_drawn[sequence_id] = batch.tick


def test_running_ahead_every_sequence_is_in_every_step_and_its_last_token_is_dropped():
    replica = SimulatedReplica(limits(**AHEAD, num_blocks=400))
    requests = [request(row, 4, max_tokens=20) for row in range(16)]
    ended = run(replica, requests)
    replica.step()
    counters = replica.scheduler.counters
    decodes = [batch for batch in replica.batches if batch.num_prefill_tokens == 0]
    assert decodes[0].num_entries == 16 and all((batch.token_ids < 0).all() for batch in decodes)
    assert counters.tokens_ahead == counters.decode_tokens > 0
    outputs = [len(sequence.output_token_ids) for sequence in ended.values()]
    stopped = sum(sequence.reason is FinishReason.STOP for sequence in ended.values())
    at_the_limit = sum(length == 20 and ended[row].reason is FinishReason.STOP for row, length in zip(ended, outputs, strict=True))
    # An end that the host learns late costs one token; max_tokens is known beforehand and costs none.
    assert counters.dropped_tokens == stopped - at_the_limit > 0
    assert counters.decode_tokens + len(requests) == sum(outputs) + counters.dropped_tokens
    # One step for each token of the longest, its prompt's included, and no gap between two.
    assert len(replica.steps) == max(outputs)


def test_running_ahead_a_draw_by_history_waits_for_its_tokens_and_the_others_do_not():
    replica = SimulatedReplica(limits(**AHEAD, num_blocks=400))
    requests = [request(row, 4, max_tokens=20, ignore_eos=True, presence_penalty=0.5 * (row % 2)) for row in range(8)]
    ended = run(replica, requests)
    assert [ended[row].output_token_ids.tolist() for row in range(8)] == [reference(wanted) for wanted in requests]
    in_steps = np.bincount([number for batch in replica.batches for number in batch.sequence_ids])
    assert in_steps.tolist() == [20] * 8 and replica.tick in (40, 41), "those that wait are in every second step"
    assert {len(batch.sequence_ids) for batch in replica.batches[:10]} == {4, 8}


@pytest.mark.parametrize("in_flight", [{"lag": 1}, {"lag": 3}, AHEAD])
def test_a_stop_text_ends_a_sequence_with_the_token_that_completes_it(in_flight):
    replica = SimulatedReplica(limits(**in_flight, num_blocks=60))
    requests = [request(row, 4, max_tokens=40, ignore_eos=True, stop="x" if row % 2 else ()) for row in range(12)]
    ended = run(replica, requests)
    assert [ended[row].output_token_ids.tolist() for row in range(12)] == [reference(wanted) for wanted in requests]
    stopped = [row for row in ended if ended[row].reason is FinishReason.STOP]
    assert len(stopped) > 2 and all(row % 2 and ended[row].output_token_ids[-1] % 17 == 0 for row in stopped)
    while replica.results:
        replica.step()
    check_empty(replica)


def test_running_ahead_a_failed_token_ends_its_sequence_alone():
    replica = SimulatedReplica(limits(**AHEAD))
    requests = [request(row, 5, max_tokens=10, ignore_eos=True) for row in range(4)]
    replica.step(requests)
    ids, tokens = replica.results[0]
    replica.results[0] = (ids, [NOT_A_TOKEN, *tokens[1:]])
    assert not replica.step()
    ended = replica.step()
    assert [e.request.row for e in ended] == [0] and "not finite" in ended[0].error
    others = run(replica, [])
    for wanted in requests[1:]:
        assert others[wanted.row].output_token_ids.tolist() == reference(wanted, 100)


def test_running_ahead_a_drain_keeps_what_is_known():
    replica = SimulatedReplica(limits(**AHEAD))
    requests = [request(row, 6, max_tokens=30, ignore_eos=True) for row in range(8)]
    for tick in range(6):
        assert not replica.step(requests if tick == 0 else [])
    partial = replica.step(drain=True)
    assert len(partial) == 8
    for row in partial:
        assert row.output_token_ids.tolist() == reference(row.request, 100)[: len(row.output_token_ids)]
        assert len(row.output_token_ids) == 5, "those of tick 5 are in flight"
    replica.step()
    check_empty(replica)


def test_context_limit_ends_a_sequence():
    replica = SimulatedReplica(limits(max_context=12))
    ended = run(replica, [request(0, 8, max_tokens=50, ignore_eos=True)])
    assert ended[0].reason is FinishReason.LENGTH
    assert len(ended[0].output_token_ids) == 4


def test_drain_returns_what_there_is_and_resuming_gives_the_same_tokens():
    replica = SimulatedReplica(limits(lag=2))
    requests = [request(row, 6, max_tokens=30, ignore_eos=True) for row in range(20)]
    for tick in range(9):
        assert not replica.step(requests if tick == 0 else [])
    partial = replica.step(drain=True)
    assert len(partial) == 20 and all(p.reason is FinishReason.NONE for p in partial)
    assert any(len(p.output_token_ids) > 0 for p in partial)
    resumed = [
        Request(
            row=p.request.row, prompt_token_ids=p.request.prompt_token_ids, sampling=p.request.sampling,
            output_token_ids=p.output_token_ids,
        )
        for p in partial
    ]
    ended = run(SimulatedReplica(limits()), resumed)
    for wanted in requests:
        assert ended[wanted.row].output_token_ids.tolist() == reference(wanted, 100)


def test_a_diverged_rank_is_an_error():
    leader, other = Scheduler(limits()), Scheduler(limits())
    nothing = np.empty(0, np.int64)
    for scheduler, num_tokens in ((leader, 5), (other, 6)):
        message = TickMessage(
            tick=0, requests=(request(0, num_tokens),), result_ids=nothing, result_tokens=nothing,
            state_hash=scheduler.state_hash(),
        )
        scheduler.apply(message)
        scheduler.schedule()
    message = TickMessage(tick=1, result_ids=nothing, result_tokens=nothing, state_hash=leader.state_hash())
    leader.apply(message)
    with pytest.raises(ReplicaDivergedError, match="tick 1"):
        other.apply(message)


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "words", "kind"),
    [(0, 1, "no tokens", RowError), (100, 1, "at most 99", RowError), (60, 90, "pages for 28 tokens", ConfigError)],
)
def test_rows_that_can_never_run_are_refused(num_tokens, max_tokens, words, kind):
    scheduler = Scheduler(limits(num_blocks=8))
    with pytest.raises(kind, match=words):
        scheduler.refuse(request(0, num_tokens, max_tokens=max_tokens))
    scheduler.refuse(request(0, 20, max_tokens=8))


@settings(max_examples=80, deadline=None)
@given(
    in_flight=st.sampled_from([{"lag": 1}, {"lag": 2}, {"lag": 3}, {"lag": 4}, AHEAD, AHEAD]), num_blocks=st.integers(14, 40), max_batch_tokens=st.integers(1, 40),
    max_sequences=st.integers(1, 12), at_once=st.integers(1, 10),
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=15),
)
def test_any_mix_ends_with_the_right_tokens(in_flight, num_blocks, max_batch_tokens, max_sequences, at_once, lengths):
    replica = SimulatedReplica(
        limits(**in_flight, num_blocks=num_blocks, max_batch_tokens=max_batch_tokens, max_sequences=max_sequences)
    )
    requests = [request(row, prompt, max_tokens=output) for row, (prompt, output) in enumerate(lengths)]
    for wanted in requests:
        replica.scheduler.refuse(wanted)
    ended = run(replica, requests, at_once)
    for wanted in requests:
        assert ended[wanted.row].output_token_ids.tolist() == reference(wanted, 100)


def test_a_sequence_without_a_token_fails_alone():
    replica = SimulatedReplica(limits())
    requests = [request(row, 5, max_tokens=10, ignore_eos=True) for row in range(4)]
    replica.step(requests)
    ids, tokens = replica.results[0]
    replica.results[0] = (ids, [NOT_A_TOKEN, *tokens[1:]])
    ended = replica.step()
    assert [e.request.row for e in ended] == [0] and "not finite" in ended[0].error
    others = run(replica, [])
    for wanted in requests[1:]:
        assert others[wanted.row].output_token_ids.tolist() == reference(wanted, 100)


@pytest.mark.parametrize("in_flight", [{"lag": 1}, {"lag": 3}, AHEAD], ids=str)
def test_what_has_not_begun_is_given_back_and_the_rest_goes_on(in_flight):
    """Few pages, so that some of those that have begun wait after a preemption."""
    replica = SimulatedReplica(limits(**in_flight, num_blocks=16, max_sequences=8))
    requests = [request(row, 6, max_tokens=30, ignore_eos=True) for row in range(20)]
    for tick in range(200):
        ended = {sequence.request.row: sequence for sequence in replica.step(requests if tick == 0 else [])}
        waiting = [s for s in replica.scheduler._by_id.values() if s.num_preemptions and s not in replica.scheduler._running.values()]
        if waiting and not ended:
            break
    assert waiting, "nobody waits after a preemption"
    assert any(len(s.tables[0]) for s in replica.scheduler._running.values())
    before, num_sequences = replica.scheduler.counters.begun, replica.scheduler.num_sequences
    given_back = replica.step(give_back=True)
    untouched = [sequence for sequence in given_back if sequence.is_cut_short]
    assert len(untouched) >= 5 and all(sequence.num_new_tokens == 0 for sequence in untouched)
    assert replica.scheduler.num_sequences == num_sequences - len(given_back) > 0
    finished = run(replica, [])
    assert {s.request.row for s in waiting} <= finished.keys(), "a preempted sequence was given back"
    assert not {s.request.row for s in untouched} & finished.keys()
    for row, sequence in finished.items():
        assert sequence.output_token_ids.tolist() == reference(requests[row], 100)
    assert replica.scheduler.counters.begun == before == 20 - len(untouched)
    check_empty(replica)
