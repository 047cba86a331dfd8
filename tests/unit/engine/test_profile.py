"""Pages from a measurement: what is computed, what is left, and what all ranks agree on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from hpcinfer.attention.naive import NaiveBackend
from hpcinfer.comm.host import LocalHostChannel
from hpcinfer.comm.local import LocalCommunicator
from hpcinfer.config.job import EngineSection
from hpcinfer.config.model import ModelConfig
from hpcinfer.engine.memory import KV_MEMORY_SHARE
from hpcinfer.engine.profile import largest_step, profiled_limits
from hpcinfer.errors import ConfigError
from hpcinfer.models.random_weights import fill_random
from hpcinfer.models.registry import model_class
from hpcinfer.parallel.axes import StageAxes
from hpcinfer.scheduler.limits import SchedulerLimits
from tests.conftest import ROOT

CPU = torch.device("cpu")
LIMITS = SchedulerLimits(
    num_blocks=500, block_size=4, max_batch_tokens=50, max_sequences=6, max_context=64, lag=1, eos_token_ids=frozenset(),
)


class FakeMeter:
    """A device on which the measured step takes `peak` and then `free` is left."""

    def __init__(self, peak: int, free: int) -> None:
        self.peak, self.free = peak, free
        self.calls: list[str] = []

    def begin(self) -> None:
        self.calls.append("begin")

    def peak_bytes(self) -> int:
        self.calls.append("peak")
        return self.peak

    def free_bytes(self) -> int:
        self.calls.append("free")
        return self.free


@pytest.fixture(scope="module")
def model():
    config = ModelConfig.from_folder(ROOT / "datasets/demo-model")
    made = model_class(config)(
        config, layers=range(config.num_layers), axes=StageAxes(tp=LocalCommunicator("tp")), backend=NaiveBackend(),
        dtype=torch.float32, device=CPU,
    )
    fill_random(made)
    return made


def page_bytes(model) -> int:
    config = model.config
    return 2 * LIMITS.block_size * config.num_kv_heads * config.head_dim * 4 * config.num_layers


def test_the_largest_step_fills_the_budget_and_draws_for_every_sequence():
    step = largest_step(LIMITS, 0)
    assert step.num_tokens == 50 and step.num_entries == 6 and step.samples.all()
    pages = step.block_tables[step.block_tables > 0]
    assert len(pages) == len(set(pages.tolist())) == sum(-(-step.query_lens // 4))
    short = largest_step(dataclasses.replace(LIMITS, max_context=5), 0)
    assert short.query_lens.max() == 5


def test_pages_are_what_the_largest_step_leaves(model):
    step = largest_step(LIMITS, 0)
    step_pages = int(sum(-(-step.query_lens // 4))) + 1
    meter = FakeMeter(peak=3_000_000 + step_pages * page_bytes(model), free=3_000_000 + 100 * page_bytes(model))
    limits = profiled_limits(model, LIMITS, EngineSection(), LocalHostChannel(), lane=0, meter=meter)
    assert meter.calls == ["begin", "peak", "free"]
    longest = -(-64 // 4) * 6
    assert limits == dataclasses.replace(LIMITS, num_blocks=min(int(100 * KV_MEMORY_SHARE["cpu"]), longest) + 1)


def test_the_step_is_really_computed(model, monkeypatch):
    seen = []
    sound = type(model).forward

    def forward(self, inputs, kv):
        seen.append(inputs.metadata.num_tokens)
        logits = yield from sound(self, inputs, kv)
        seen.append(tuple(logits.shape))
        return logits

    monkeypatch.setattr(type(model), "forward", forward)
    profiled_limits(model, LIMITS, EngineSection(), LocalHostChannel(), lane=0, meter=FakeMeter(10**9, 10**10))
    assert seen == [50, (6, model.config.vocab_size)]


def test_the_rank_with_least_memory_decides(model):
    class Channel(LocalHostChannel):
        def all_gather(self, obj, *, deadline_s=None):
            names, leaders, minimum, values = obj
            return [obj, (names, leaders, {"num_blocks": 17}, None)]

    limits = profiled_limits(model, LIMITS, EngineSection(), Channel(), lane=0, meter=FakeMeter(10**6, 10**10))
    assert limits.num_blocks == 17


def test_an_explicit_size_stays_where_it_fits_and_is_an_error_where_not(model):
    engine = EngineSection(kv_memory=f"{40 * page_bytes(model)} B")
    limits = dataclasses.replace(LIMITS, num_blocks=41)
    roomy, tight = FakeMeter(0, 10**9), FakeMeter(0, 20 * page_bytes(model))
    assert profiled_limits(model, limits, engine, LocalHostChannel(), lane=0, meter=roomy).num_blocks == 41
    with pytest.raises(ConfigError, match="more than this rank has") as raised:
        profiled_limits(model, limits, engine, LocalHostChannel(), lane=0, meter=tight)
    assert "measured" in raised.value.found


def test_no_room_is_said(model):
    with pytest.raises(ConfigError, match="no memory for the keys and values"):
        profiled_limits(model, LIMITS, EngineSection(), LocalHostChannel(), lane=0, meter=FakeMeter(10**9, 10**6))


def test_a_lane_counts_its_own_tokens():
    step = largest_step(dataclasses.replace(LIMITS, num_lanes=3), 1)
    assert step.lane_tokens == (50, 50, 50) and np.all(step.context_lens == 0)
