"""`parallel.two_batch`: what it comes to at the start, under a measurement that the test decides.

That all ranks of a real world come to the same is in tests/ranks/test_records.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hpcinfer.comm.host import LocalHostChannel
from hpcinfer.comm.local import LocalCommunicator
from hpcinfer.engine.overlap import with_two_batch
from hpcinfer.parallel.axes import StageAxes
from hpcinfer.scheduler.limits import SchedulerLimits
from tests.unit.engine.fake_measurement import fake_measurement, gain_from


class Axis(LocalCommunicator):
    """An axis of two ranks, of which nothing is asked but its size."""

    def __init__(self) -> None:
        super().__init__("tp")
        self.size = 2


class Channel(LocalHostChannel):
    """The channel of this rank and of another one, which is slower than it by a factor, as a whole step or divided."""

    def __init__(self, *, whole: float = 1.0, divided: float = 1.0) -> None:
        super().__init__("control")
        self._slower = (whole, divided)

    def all_gather(self, obj, *, deadline_s=None):
        if isinstance(obj, tuple):
            return [obj, tuple([s * slower for s in spent] for spent, slower in zip(obj, self._slower, strict=True))]
        return [obj, obj]


def limits(max_batch_tokens=256, num_blocks=65, max_context=512) -> SchedulerLimits:
    return SchedulerLimits(
        num_blocks=num_blocks, block_size=16, max_batch_tokens=max_batch_tokens, max_sequences=8,
        max_context=max_context, lag=1, eos_token_ids=frozenset(),
    )


def decide(setting="auto", **more) -> int:
    return decided(setting, **more).two_batch_tokens


def decided(setting="auto", *, axes=None, control=None, at_most=None) -> SchedulerLimits:
    model = SimpleNamespace(
        axes=axes or StageAxes(tp=Axis()), device=torch.device("cpu"), forget_expert_load=lambda: None
    )
    kv = SimpleNamespace(layout=SimpleNamespace(block_size=16))
    return with_two_batch(setting, model, kv, at_most or limits(), control or Channel(), lane=0)


@pytest.mark.parametrize(("least", "found"), [(1, 32), (32, 32), (33, 64), (64, 64), (100, 128), (200, 256), (257, 0)])
def test_the_smallest_size_that_gains(monkeypatch, least, found):
    """Sizes are halved from the largest step on, and never below 32 tokens."""
    measured = fake_measurement(monkeypatch, gain_from(least))
    assert decide() == found
    assert min(map(sum, measured)) >= 32
    assert all(len(parts) == 1 or abs(parts[0] - parts[1]) <= 1 for parts in measured)


def test_a_gain_within_the_noise_is_none(monkeypatch):
    fake_measurement(monkeypatch, gain_from(1, share=0.02))
    assert decide() == 0
    fake_measurement(monkeypatch, gain_from(1, share=0.04))
    assert decide() == 32


@pytest.mark.parametrize(
    ("at_most", "found"),
    [
        (limits(), 32), (limits(max_batch_tokens=96), 48), (limits(num_blocks=7), 48), (limits(max_context=80), 40),
        (limits(31), 0),
    ],
)
def test_the_largest_step_is_what_the_limits_allow(monkeypatch, at_most, found):
    measured = fake_measurement(monkeypatch, gain_from(1))
    assert decide(at_most=at_most) == found
    most = min(at_most.max_batch_tokens, at_most.num_tokens, at_most.max_context)
    assert all(sum(parts) <= most for parts in measured)


def test_the_slowest_rank_decides(monkeypatch):
    """This rank alone would gain a half; another one is as slow divided as whole."""
    fake_measurement(monkeypatch, gain_from(1))
    assert decide(control=Channel()) == 32
    assert decide(control=Channel(divided=2.0)) == 0
    assert decide(control=Channel(whole=2.0, divided=2.0)) == 32


def test_a_measurement_that_would_last_is_made_smaller(monkeypatch):
    measured = fake_measurement(monkeypatch, gain_from(1, token_s=0.01))  # 32 tokens take 0.32 s
    assert decide() == 37
    assert max(map(sum, measured)) == 150
    fake_measurement(monkeypatch, gain_from(1, token_s=0.1))
    assert decide() == 0


def test_nothing_is_measured_where_nothing_can_be_hidden(monkeypatch):
    measured = fake_measurement(monkeypatch, gain_from(1))
    assert decide(axes=StageAxes(tp=LocalCommunicator("tp")), control=LocalHostChannel("control")) == 0
    assert decide("off") == 0
    assert decide("48") == 48
    assert not measured
    assert decide(axes=StageAxes(tp=LocalCommunicator("tp"), ep=Axis())) == 32
    assert measured


def test_lanes_are_measured_with_a_prompt_that_they_share(monkeypatch):
    measured = fake_measurement(monkeypatch, gain_from(1))
    assert decide(axes=StageAxes(tp=LocalCommunicator("tp"), sp=Axis()), at_most=limits(max_context=180)) == 45
    assert max(map(sum, measured)) == 90, "two lanes share 180 tokens"


def test_decodes_alone_are_divided_only_where_the_job_says_so(monkeypatch):
    fake_measurement(monkeypatch, gain_from(1))
    assert not decided("auto").divide_decodes
    assert decided("48").divide_decodes
