"""The analysis of traces, on records whose overlap is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.observe.trace import HOST, IDLE, TICK
from hpcinfer.observe.trace_analysis import (
    analyse, axis_of, axis_time, both, layer_of, length, minus, operations_by_tick, rank_time, stage_times, step_ticks,
    union,
)
from tests.unit.observe.trace_makers import make_trace, segment, transfer, wait

SPANS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 12)).map(lambda pair: (pair[0], pair[0] + pair[1])), max_size=12
)


def points(spans) -> set[int]:
    """The unit cells that spans of whole numbers cover."""
    return {cell for start, end in spans for cell in range(int(start), int(end))}


def array(spans) -> np.ndarray:
    return np.array(spans, float).reshape(-1, 2)


@given(SPANS, SPANS)
def test_interval_sets_are_sets(one, other):
    a, b = union(array(one)), union(array(other))
    assert points(a) == points(one) and length(a) == len(points(one))
    assert (a[1:, 0] > a[:-1, 1]).all() and (a[:, 1] > a[:, 0]).all()
    assert points(both(a, b)) == points(one) & points(other)
    assert points(minus(a, b)) == points(one) - points(other)
    assert length(both(a, b)) + length(minus(a, b)) == pytest.approx(length(a))


def test_two_batch_overlap_exposes_exactly_what_is_waited_for(tmp_path):
    """Microbatch 1 computes 10 s while the 14 s all-reduce of microbatch 0 is in flight: 4 s are exposed."""
    records = [
        segment(100, 110), transfer(110, 124), segment(110, 120, part=1), transfer(120, 131, number=2), wait(120, 124),
        segment(124, 130), wait(130, 131), segment(131, 140, part=1), (HOST, "", "commit", 140.0, 150.0),
        wait(150, 200, track="control", kind=IDLE),
    ]
    time = rank_time(make_trace(tmp_path, records))
    assert (time.wall_s, time.compute_s, time.segments_s, time.exposed_s, time.idle_s) == (100, 45, 35, 5, 50)
    assert time.other_s == 0 and time.steps == 1


def test_the_innermost_of_nested_records_counts(tmp_path):
    """A scheduler tick that waits for tokens and commits meanwhile; a poll inside an idle stretch."""
    records = [
        (TICK, "", "message", 100.0, 130.0, 5), wait(110, 125, track="tokens"), (HOST, "", "commit", 128.0, 140.0),
        (IDLE, "", "no rows", 150.0, 170.0), (HOST, "", "merge", 145.0, 180.0), wait(175, 176, track="control"),
        segment(90, 95), segment(190, 205),
    ]
    time = rank_time(make_trace(tmp_path, records))
    # 100-110, 125-140, 145-150, 170-175, 176-180, 190-200 of the main thread's work lie in the wall time 100-200.
    assert time.compute_s == 10 + 15 + 5 + 5 + 4 + 10
    assert (time.exposed_s, time.idle_s, time.other_s) == (16, 20, 15)


def test_what_no_record_explains_is_shown(tmp_path):
    time = rank_time(make_trace(tmp_path, [segment(110, 120), transfer(100, 190), wait(120, 130)]))
    assert (time.compute_s, time.exposed_s, time.idle_s, time.other_s) == (10, 10, 0, 80), "a transfer alone is neither"


def test_dropped_records_shorten_the_wall(tmp_path):
    trace = make_trace(tmp_path, [segment(150, 160), segment(160, 200)])
    trace.header["dropped"] = True
    time = rank_time(trace)
    assert (time.wall_s, time.compute_s, time.other_s) == (40, 40, 0)


def test_axes_count_steps_only(tmp_path):
    ranks = []
    for rank in (0, 1):
        records = [
            segment(100, 101, tick=0), segment(110, 111, tick=1), segment(120, 121, tick=1),
            transfer(101, 104, tick=0, num_bytes=16), transfer(111, 112, tick=1, number=2),
            transfer(111, 113, tick=1, number=3),
            transfer(90, 95, tick=-1, number=0, num_bytes=1000), wait(90, 95, tick=-1), wait(102, 104 + rank, tick=0),
            wait(112, 113, tick=1), transfer(130, 131, track="pp 0>1", verb="send", tick=1, peer=1, num_bytes=40),
            transfer(140, 150, track="control", verb="broadcast", tick=7),
        ]
        ranks.append(make_trace(tmp_path, records[: 12 - 2 * rank], rank=rank))
    tp = axis_time(ranks, "tp")
    assert (tp.ranks, tp.operations_per_step, tp.bytes_per_step) == (2, 1.5, 16)
    assert (tp.transfer_s, tp.exposed_s) == (6, 3.5)
    pp = axis_time(ranks, "pp")
    assert (pp.ranks, pp.operations_per_step, pp.bytes_per_step, pp.transfer_s, pp.exposed_s) == (1, 0.5, 20, 1, 0)
    assert axis_time(ranks, "sp") is None and axis_time(ranks, "control") is None
    assert step_ticks(ranks[0]).tolist() == [0, 1]
    assert operations_by_tick(ranks[0], "tp") == {0: {"all_reduce": 1}, 1: {"all_reduce": 2}}
    assert [axis.axis for axis in analyse(ranks).axes] == ["tp", "pp"]


def test_a_bubble_is_time_without_own_work_between_first_and_last_segment(tmp_path):
    def rank_of(stage, records, rank):
        place = {"replica": 0, "stage": stage, "lane": 0, "tp": 0}
        return make_trace(tmp_path, records, rank=rank, coordinates=place)

    first = rank_of(
        0, [segment(100, 120), wait(120, 130), segment(130, 140), (HOST, "", "read", 140.0, 150.0), segment(150, 200)], 0
    )
    second = rank_of(
        1, [segment(110, 120), (TICK, "", "execute", 120.0, 150.0), wait(120, 150, track="pp 0>1"), segment(150, 160),
            wait(160, 190, track="control", kind=IDLE), segment(190, 210)], 1
    )
    stages = stage_times([first, second])
    assert [(stage.stage, stage.window_s) for stage in stages] == [(0, 100), (1, 100)]
    assert stages[0].bubble == pytest.approx(0.0), "waiting inside the stage and reading are no bubble"
    assert stages[1].bubble == pytest.approx(0.6)


def test_ranks_without_a_trace_are_named(tmp_path):
    assert analyse([make_trace(tmp_path, [segment(1.0, 2.0)], num_ranks=3, rank=1)]).missing == (0, 2)


def test_names_of_axes_and_layers():
    names = {"tp": "tp", "pp 10>11": "pp", "tokens 3": "tokens", "world": "control", "": "", "strange": ""}
    assert {name: axis_of(name) for name in names} == names
    assert layer_of("layer 13 o") == (13, "o") and layer_of("embedding") is None


def test_an_empty_trace_has_a_report(tmp_path):
    report = analyse([make_trace(tmp_path, [])])
    assert report.ranks[0].other_s == 100 and not report.axes and not report.stages
