"""Captured decode steps: which step takes which capture, how it is padded, and that nothing else differs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from hpcinfer.attention.naive import NaiveBackend
from hpcinfer.batch import MicroBatch, Step
from hpcinfer.comm.local import LocalCommunicator
from hpcinfer.comm.operation import Mark
from hpcinfer.config.model import ModelConfig
from hpcinfer.models.base import StageInputs
from hpcinfer.models.random_weights import fill_random
from hpcinfer.models.registry import model_class
from hpcinfer.observe.trace import COMPUTE, Recorder
from hpcinfer.parallel.axes import StageAxes
from hpcinfer.parallel.segments import run_to_end
from hpcinfer.pipeline.graphs import DecodeGraphs, decode_buckets
from hpcinfer.pipeline.runner import StageRunner
from hpcinfer.pipeline.transfer import StageLinks
from hpcinfer.pipeline.watch import SegmentWatch
from tests.conftest import ROOT
from tests.graphs import CalledAgain

CPU = torch.device("cpu")
SIZE, BLOCKS = 4, 40


def decodes(lens: list[int], *, seed: int = 0, **changes) -> MicroBatch:
    """One decode for each length, on pages of its own in random order."""
    rng = np.random.default_rng(seed)
    needed = [-(-(length + 1) // SIZE) for length in lens]
    order = rng.permutation(np.arange(1, BLOCKS))
    tables = np.zeros((len(lens), max(needed, default=0)), np.int32)
    start = 0
    for row, count in enumerate(needed):
        tables[row, :count] = order[start : start + count]
        start += count
    facts = dict(
        tick=0, is_prefill=False, sequence_ids=tuple(range(len(lens))),
        token_ids=rng.integers(3, 200, len(lens)).astype(np.int32), query_lens=np.ones(len(lens), np.int32),
        context_lens=np.array(lens, np.int32), block_tables=tables, samples=np.ones(len(lens), bool),
    )
    return MicroBatch(**(facts | changes))


@pytest.fixture(scope="module")
def model():
    config = ModelConfig.from_folder(ROOT / "datasets/demo-model")
    made = model_class(config)(
        config, layers=range(config.num_layers), axes=StageAxes(tp=LocalCommunicator("tp")), backend=NaiveBackend(),
        dtype=torch.float32, device=CPU,
    )
    fill_random(made)
    return made


@pytest.fixture
def pages(model):
    """Pages full of numbers; page 0 is full of NaN."""
    kv = model.allocate_kv(num_blocks=BLOCKS, block_size=SIZE)
    generator = torch.Generator().manual_seed(1)
    for index in range(kv.num_layers):
        for cache in kv.layer(index):
            cache.normal_(generator=generator)
            cache[0] = float("nan")
    return kv


def graphs_of(model, kv, **settings) -> DecodeGraphs:
    made = DecodeGraphs(model, kv, make_graph=CalledAgain, buckets=[2, 4, 8], max_context=64, **settings)
    made.capture()
    return made


def eager(model, kv, part: MicroBatch, **settings) -> torch.Tensor:
    with torch.inference_mode():
        return run_to_end(model.forward(StageInputs.from_microbatch(part, block_size=SIZE, device=CPU, **settings), kv))


def copy_of(kv) -> list[torch.Tensor]:
    return [cache.clone() for index in range(kv.num_layers) for cache in kv.layer(index)]


@pytest.mark.parametrize("lens", [[5], [0, 3], [9, 4, 17], [1, 2, 3, 4, 5, 6, 7, 20]])
def test_a_replay_computes_what_the_step_alone_would_and_touches_no_other_page(model, pages, lens):
    graphs = graphs_of(model, pages)
    # A larger step before, whose rows must not be left over in the padding.
    large = decodes([3] * 8, seed=7)
    graphs.run(graphs.key_of([large]), [large], [None], None)
    before, part = copy_of(pages), decodes(lens)
    (output,) = graphs.run(graphs.key_of([part]), [part], [None], None)
    found, after = output.clone(), copy_of(pages)
    for index in range(pages.num_layers):
        for cache, old in zip(pages.layer(index), before[2 * index : 2 * index + 2], strict=True):
            cache.copy_(old)
    wanted = eager(model, pages, part)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    for mine, theirs in zip(after, copy_of(pages), strict=True):
        torch.testing.assert_close(mine[1:], theirs[1:], rtol=0, atol=1e-5)


def test_a_replay_is_recorded_as_computation(model, pages):
    """As one segment: traces would otherwise show stages that do not draw as idle."""
    recorder = Recorder()
    links = StageLinks(None, None, hidden_size=model.config.hidden_size, dtype=torch.float32, device=CPU)
    runner = StageRunner(model, pages, links, lane=0, watch=SegmentWatch(Mark(), recorder), graphs=graphs_of(model, pages))
    part = decodes([5, 6], tick=7)
    runner.run(runner.prepare(Step(tick=7, parts=(part,), drawing=((0, 1),))))
    [record] = [row for row in recorder.rows() if row.kind == COMPUTE]
    assert record.tick == 7 and 0 < record.start_s < record.end_s


def test_tokens_that_only_the_device_knows(model, pages):
    graphs = graphs_of(model, pages)
    part = decodes([5, 6, 7])
    known = dataclasses.replace(part, token_ids=np.array([30, 40, 50], np.int32))
    ahead = dataclasses.replace(part, token_ids=np.array([-3, 40, -1], np.int32))
    drawn = torch.tensor([50, 99, 30])
    (wanted,) = graphs.run((4,), [known], [None], None)
    wanted = wanted.clone()
    (found,) = graphs.run((4,), [ahead], [None], drawn)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    torch.testing.assert_close(eager(model, pages, ahead, drawn=drawn), wanted, rtol=0, atol=1e-5)


def test_which_steps_are_replayed(model, pages):
    graphs = graphs_of(model, pages)
    assert graphs.key_of([decodes([3])]) == (2,)
    assert graphs.key_of([decodes([3] * 5)]) == (8,)
    assert graphs.key_of([decodes([3] * 9)]) is None, "larger than any capture"
    assert graphs.key_of([decodes([3], is_prefill=True)]) is None
    assert graphs.key_of([decodes([3]), decodes([3])]) is None, "captured for undivided steps"
    divided = graphs_of(model, pages, max_parts=2)
    assert divided.key_of([decodes([3] * 3), decodes([3] * 2)]) == (4, 4)


def test_both_microbatches_of_a_divided_step(model, pages):
    graphs = graphs_of(model, pages, max_parts=2)
    both = decodes([3, 8, 1, 6, 2])
    rows = ("sequence_ids", "token_ids", "query_lens", "context_lens", "block_tables", "samples")
    first, second = (
        dataclasses.replace(both, lane_tokens=(), **{name: getattr(both, name)[part] for name in rows})
        for part in (slice(0, 3), slice(3, 5))
    )
    outputs = graphs.run((4, 4), [first, second], [None, None], None)
    for found, part in zip(outputs, (first, second), strict=True):
        torch.testing.assert_close(found, eager(model, pages, part), rtol=0, atol=1e-5)
    assert graphs.replays == 1


@pytest.mark.parametrize("most", [1, 3, 4, 7, 64, 100, 256, 500, 1024])
def test_buckets_rise_to_the_largest_step_and_waste_little(most):
    buckets = decode_buckets(most)
    assert buckets == sorted(set(buckets)) and buckets[0] == 1 and buckets[-1] == most
    for count in range(1, most + 1):
        bucket = next(b for b in buckets if b >= count)
        assert bucket - count <= max(7, count // 4), (count, bucket)
    assert len(buckets) <= 60
