"""The time of steps by phase, on the host and on a device that lags behind it."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from hpcinfer.batch import MicroBatch, Step
from hpcinfer.comm.device_queue import Reporting
from hpcinfer.comm.operation import Mark
from hpcinfer.engine.step_clock import DeviceStepClock, HostStepClock
from hpcinfer.observe.metrics import PhaseClock
from tests.fake_streams import FakeStreams


def step(num_prefill: int, num_decode: int) -> Step:
    count = num_prefill + num_decode
    batch = MicroBatch(
        tick=3, sequence_ids=tuple(range(count)), token_ids=np.zeros(count, np.int32), query_lens=np.ones(count, np.int32),
        context_lens=np.zeros(count, np.int32), block_tables=np.zeros((count, 1), np.int32), samples=np.ones(count, bool),
        num_prefill_tokens=num_prefill,
    )
    return Step(tick=3, parts=(batch,), drawing=((),))


def test_on_the_host_waiting_is_communication_and_the_rest_is_shared_by_tokens():
    clock, waited = PhaseClock(), [0.0]
    steps = HostStepClock(clock, lambda: waited[0])
    with steps.measured(step(3, 1)):
        time.sleep(0.05)
        waited[0] = 0.01
    seconds = clock.seconds
    assert seconds["communication"] == pytest.approx(0.01)
    assert seconds["prefill"] == pytest.approx(3 * seconds["decode"]) and seconds["prefill"] + seconds["decode"] > 0.035


class LaggingStreams(FakeStreams):
    """Computes on a stream of its own, behind the host."""

    def __init__(self) -> None:
        super().__init__()
        self.compute = self.create()

    def current(self):
        return self.compute


def device_clock(deadline_s: float = 60.0) -> tuple[DeviceStepClock, LaggingStreams, PhaseClock]:
    streams, clock = LaggingStreams(), PhaseClock()
    reporting = Reporting(mark=Mark(), world_rank=2, host="n1")
    return DeviceStepClock(clock, streams=streams, reporting=reporting, deadline_s=deadline_s), streams, clock


def test_on_a_device_the_time_is_that_of_the_device():
    steps, streams, clock = device_clock()
    began = time.monotonic()
    with steps.measured(step(0, 4)):
        streams.compute.enqueue(lambda: time.sleep(0.2))
    assert time.monotonic() - began < 0.15, "the host does not wait"
    assert clock.seconds["decode"] == 0
    steps.finish()
    assert 0.19 < clock.seconds["decode"] < 2 and clock.seconds["prefill"] == 0


def test_a_step_that_never_ends_is_reported_with_its_tick():
    steps, streams, _ = device_clock(deadline_s=0.1)
    steps._reporting.mark.set(812)
    stuck = threading.Event()
    with steps.measured(step(5, 0)):
        streams.compute.enqueue(stuck.wait)
    assert steps.poll(time.perf_counter()) is None
    error = steps.poll(time.perf_counter() + 1)
    stuck.set()
    for part in ("step", "5 tokens", "tick 812", "world rank 2, host n1", "deadline of 0.1 s"):
        assert part in str(error), str(error)
