"""What the first-in-first-out schedule hides, exactly: transfers take time on a link and nothing else (`fake_link`).

Letters: m forwards; n transfers in each, so n + 1 segments; c seconds of computation a segment, t of a transfer. Times
are whole numbers, so that floats are exact.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.attention.registry import attention_query, select_backend
from hpcinfer.batch import MicroBatch, Step
from hpcinfer.config.model import ModelConfig
from hpcinfer.models.random_weights import fill_random
from hpcinfer.models.registry import model_class
from hpcinfer.parallel.axes import StageAxes
from hpcinfer.comm.local import LocalCommunicator
from hpcinfer.parallel.segments import Segments, run_to_end
from hpcinfer.pipeline.runner import StageRunner
from hpcinfer.pipeline.schedule import interleave
from hpcinfer.pipeline.transfer import StageLinks
from tests.unit.pipeline.fake_link import FakeCommunicator, SleepingClock, VirtualClock

CPU = torch.device("cpu")


@dataclasses.dataclass(kw_only=True)
class Run:
    """What became of a schedule."""

    step_s: float
    computed_s: float
    exposed_s: float
    issued: list[str]
    """Labels "forward.transfer" in the order of their issue."""
    segments: list[tuple[int, int]]
    """(forward, segment) in the order of their computation."""


def run(forwards, clock=None, drive=interleave) -> Run:
    """Drive forwards, each a list of (computation, transfer after it or None)."""
    clock = clock or VirtualClock()
    link = FakeCommunicator(clock, lambda tensor: 0.0)
    segments = []

    def forward(index, pairs) -> Segments:
        for number, (computed_s, transfer_s) in enumerate(pairs):
            segments.append((index, number))
            clock.compute(computed_s)
            if transfer_s is not None:
                yield link.timed(transfer_s, f"{index}.{number}")

    start_s = clock.now_s
    drive([forward(index, pairs) for index, pairs in enumerate(forwards)])
    result = Run(
        step_s=clock.now_s - start_s, computed_s=clock.computed_s, exposed_s=link.exposed_s,
        issued=[transfer.label for transfer in link.transfers], segments=segments,
    )
    assert link.counters.wait_s == pytest.approx(link.exposed_s)
    return result


def even(c, t, n):
    """n transfers of t between n + 1 segments of c."""
    return [(c, t)] * n + [(c, None)]


def one_by_one(forwards):
    return [run_to_end(forward) for forward in forwards]


@pytest.mark.parametrize(("c", "t", "n"), [(5, 3, 4), (3, 5, 4), (4, 4, 1), (0, 2, 3), (2, 0, 3)])
def test_one_forward_hides_nothing(c, t, n):
    result = run([even(c, t, n)])
    assert result.exposed_s == n * t
    assert result.step_s == (n + 1) * c + n * t


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize(("c", "t"), [(5, 3), (4, 4), (3, 5), (1, 9), (9, 1), (1, 0)])
def test_two_forwards_hide_all_that_computation_covers(c, t, n):
    result = run([even(c, t, n)] * 2)
    assert result.computed_s == 2 * (n + 1) * c
    if c >= t:  # every transfer is over before the other forward's segment is
        assert result.exposed_s == 0
        assert result.step_s == 2 * (n + 1) * c
    else:  # the link never rests between the first segment and the last
        assert result.exposed_s == 2 * n * (t - c)
        assert result.step_s == c + 2 * n * t + c
    # Against both halves one after the other, which is what one forward of both costs where the rate is the same.
    alone = run([even(c, t, n)] * 2, drive=one_by_one)
    assert alone.exposed_s == 2 * n * t and alone.step_s == 2 * (n + 1) * c + 2 * n * t
    assert alone.step_s - result.step_s == 2 * n * min(c, t)


@pytest.mark.parametrize("m", [2, 3, 4])
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize(("c", "t"), [(5, 3), (4, 4), (10, 11), (3, 5), (1, 9)])
def test_more_forwards_are_bound_by_computation_or_by_the_link(c, t, n, m):
    result = run([even(c, t, n)] * m)
    # The link begins after the first segment, and the last segment begins after the link.
    assert result.step_s == max(m * (n + 1) * c, c + m * n * t + c)
    assert result.exposed_s == result.step_s - m * (n + 1) * c


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("larger_first", [True, False])
@pytest.mark.parametrize(("a", "b", "t"), [(7, 3, 2), (7, 3, 3), (7, 3, 5), (7, 3, 7), (7, 3, 9), (5, 5, 6)])
def test_unequal_forwards(a, b, t, n, larger_first):
    """Segments of a and b seconds, a >= b: the larger one's transfer is covered by the smaller one's segment."""
    forwards = [even(a, t, n), even(b, t, n)]
    result = run(forwards if larger_first else forwards[::-1])
    if t <= b:
        exposed_s = 0
    elif t <= a:
        exposed_s = n * (t - b)
    else:
        exposed_s = n * (2 * t - a - b)
    assert result.exposed_s == exposed_s
    assert result.step_s == (n + 1) * (a + b) + exposed_s


def longest_path(forwards) -> float:
    """The end of the last of all tasks, when a task begins as soon as those that it must follow are over.

    For forwards of equal numbers of segments: the processor takes segment k of all forwards and then segment k + 1; the
    link takes transfers in the same order; a segment follows the transfer before it.
    """
    order = [(index, k) for k in range(len(forwards[0])) for index in range(len(forwards))]
    transfers = [place for place in order if forwards[place[0]][place[1]][1] is not None]
    length, before = {}, {}
    for place in order:
        index, k = place
        length["compute", place], length["link", place] = forwards[index][k]
        before["compute", place] = [("link", (index, k - 1))] if k else []
        before["link", place] = [("compute", place)]
    for kind, places in (("compute", order), ("link", transfers)):
        for earlier, later in itertools.pairwise(places):
            before[kind, later].append((kind, earlier))
    ends: dict = {}
    for place in order:
        for kind in ("compute", "link") if place in transfers else ("compute",):
            ends[kind, place] = max((ends[task] for task in before[kind, place]), default=0) + length[kind, place]
    return ends["compute", order[-1]]


@given(st.data())
def test_any_durations_take_the_longest_path(data):
    m, n = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 6))
    seconds = st.integers(0, 9)
    forwards = [
        [(data.draw(seconds), data.draw(seconds)) for _ in range(n)] + [(data.draw(seconds), None)] for _ in range(m)
    ]
    result = run(forwards)
    assert result.step_s == longest_path(forwards)
    assert result.exposed_s == result.step_s - result.computed_s
    assert result.computed_s == sum(computed for pairs in forwards for computed, _ in pairs)


SECONDS = st.integers(0, 9)


@given(st.lists(st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=6), min_size=1, max_size=4))
def test_the_order_does_not_depend_on_durations(forwards):
    """Every rank issues the same, however long its segments take; a chunk's k-th segment precedes a later chunk's."""
    slow, fast = run(forwards), run([[(0, 0) for _ in pairs] for pairs in forwards])
    assert slow.issued == fast.issued
    assert slow.segments == fast.segments
    position = {place: number for number, place in enumerate(slow.segments)}
    for (index, k), (other, j) in itertools.product(position, repeat=2):
        if k == j and index < other:
            assert position[index, k] < position[other, j]
    for index, pairs in enumerate(forwards):
        own = [k for other, k in slow.segments if other == index]
        assert own == [*range(len(pairs))], "segments of a forward in their order"


def test_forwards_of_unequal_lengths_end_in_turn():
    result = run([even(2, 1, 3), even(2, 1, 1)])
    assert result.segments == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (0, 3)]
    # Both have segments until the shorter one has ended: its last segment still covers 0.1; 0.2 is exposed.
    assert result.exposed_s == 1 and result.step_s == 13


def test_segments_are_recorded_and_between_comes_before_each_turn():
    recorded, calls = [], []
    clock = VirtualClock()
    link = FakeCommunicator(clock, lambda tensor: 0.0)

    def forward(value):
        for number in range(2):
            clock.compute(1.0)
            yield link.timed(5.0, f"{value}{number}")
        return value

    results = interleave(
        [forward("a"), forward("b")], between=lambda: calls.append(clock.now_s),
        on_segment=lambda index, label, start_s, end_s: recorded.append((index, label, end_s >= start_s)),
    )
    assert results == ["a", "b"]
    assert recorded == [
        (0, "a0", True), (1, "b0", True), (0, "a1", True), (1, "b1", True), (0, "", True), (1, "", True)
    ]
    assert calls == [0.0, 1.0, 2.0, 7.0, 12.0, 16.0]  # before the wait of the turn


# -- a real stage on the fake link -------------------------------------------------------------------------------------

LAYERS, HIDDEN, TOKENS = 3, 32, 24
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": 48,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "rope_theta": 1e4, "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}


def part_of(number, start, end, last):
    """Tokens start to end of one prompt of TOKENS tokens: a chunk that draws only at the end."""
    return MicroBatch(
        tick=0, part=number, sequence_ids=(0,), token_ids=np.arange(start, end, dtype=np.int32),
        query_lens=np.array([end - start], np.int32), context_lens=np.array([start], np.int32),
        block_tables=np.arange(1, 4, dtype=np.int32)[None], samples=np.array([last]),
    )


def stage_step(bounds, token_s, byte_s) -> tuple[float, FakeCommunicator]:
    """Run a stage of a real model on chunks of one prompt; a segment of T tokens takes T * token_s seconds.

    Returns the step's time up to its last transfer's end, and the link.
    """
    clock = VirtualClock()
    tokens_of = {end - start: end - start for start, end in itertools.pairwise(bounds)}

    def computation(tensor):
        # A gather of logits has one row: the norm and the head after the last layer count nothing.
        clock.compute(token_s * tokens_of.get(tensor.shape[0], 0))

    def duration(tensor):
        return byte_s * tensor.nbytes if tensor.shape[0] in tokens_of else 0.0

    link = FakeCommunicator(clock, duration, on_issue=computation)
    config = ModelConfig.from_dict(CONFIG)
    query = attention_query(config, tp=2, block_size=8, dtype=torch.float32, device=CPU)
    backend = select_backend(query, setting="naive").backend
    model = model_class(config)(
        config, layers=range(LAYERS), axes=StageAxes(tp=link), backend=backend, dtype=torch.float32, device=CPU
    )
    fill_random(model)
    links = StageLinks(None, None, hidden_size=HIDDEN, dtype=torch.float32, device=CPU)
    runner = StageRunner(model, model.allocate_kv(num_blocks=8, block_size=8), links, lane=0)
    chunks = list(itertools.pairwise(bounds))
    parts = tuple(part_of(k, start, end, k == len(chunks) - 1) for k, (start, end) in enumerate(chunks))
    logits = runner.run(runner.prepare(Step(tick=0, parts=parts, drawing=((0,),))))
    assert logits.shape == (1, 64)
    return clock.now_s, link


TRANSFERS = 1 + 2 * LAYERS
"""Of T x D: the embedding's all-reduce and two a layer."""


@pytest.mark.parametrize("byte_s", [1 / 64, 1 / 256])
def test_a_real_stage_leaves_its_transfers_pending(byte_s):
    """Two chunks of one prompt: what a model's layers expose is the closed form, with c and t of half the tokens."""
    half = TOKENS // 2
    c, t = half * 1.0, half * HIDDEN * 4 * byte_s
    assert (c < t) == (byte_s == 1 / 64)
    whole_s, alone = stage_step([0, TOKENS], 1.0, byte_s)
    assert alone.exposed_s == TRANSFERS * 2 * t and whole_s == TRANSFERS * (2 * c + 2 * t)
    step_s, link = stage_step([0, half, TOKENS], 1.0, byte_s)
    # One segment fewer than the closed form above: what follows the last transfer counts nothing.
    n = TRANSFERS
    predicted_s = c + 2 * n * t if c < t else 2 * n * c + t
    assert step_s == predicted_s
    assert link.exposed_s == predicted_s - 2 * n * c
    labels = [transfer.label for transfer in link.transfers]
    pairs = labels[: 2 * n]
    assert pairs[::2] == pairs[1::2], "the chunks' transfers alternate"


# -- the same with real timers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("c", "t"), [(0.02, 0.01), (0.01, 0.02)])
def test_real_timers(c, t):
    """Sleeps may be long on a busy machine, never short: the best of some runs is near the closed form."""
    n = 4
    predicted_s = max(2 * (n + 1) * c, 2 * n * t + 2 * c)
    runs = [run([even(c, t, n)] * 2, SleepingClock()) for _ in range(4)]
    assert all(result.step_s >= predicted_s for result in runs)
    best = min(runs, key=lambda result: result.step_s)
    assert best.step_s <= 1.4 * predicted_s
    alone = run([even(c, t, n)] * 2, SleepingClock(), drive=one_by_one)
    assert alone.step_s >= 2 * (n + 1) * c + 2 * n * t > best.step_s
    assert best.exposed_s <= 0.5 * alone.exposed_s + 2 * n * max(0.0, t - c)
