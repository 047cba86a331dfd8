"""How long steps take, by phase: on the CPU by the host's clock, on a GPU by events, because there the host runs ahead."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

from hpcinfer.batch import Step
from hpcinfer.comm.communicator import Counters
from hpcinfer.comm.device_queue import DeviceOperation, EventQueue, Reporting
from hpcinfer.comm.streams import Streams
from hpcinfer.observe.metrics import PhaseClock


class StepClock(ABC):
    """Adds the time of each step to the phases prefill, decode and communication of a clock."""

    @abstractmethod
    def measured(self, step: Step) -> contextlib.AbstractContextManager[None]:
        """The step is computed, or queued, inside the block."""


def add_time(clock: PhaseClock, step: Step, seconds: float) -> None:
    """A mixed step's time is shared between the two phases by tokens."""
    prefill_share = sum(part.num_prefill_tokens for part in step.parts) / max(step.num_tokens, 1)
    clock.add("prefill", seconds * prefill_share)
    clock.add("decode", seconds * (1 - prefill_share))


class HostStepClock(StepClock):
    """For steps that are over when the block ends.

    Args:
        clock: where times are added.
        waited_s: seconds that this rank has been blocked in communication so far.
    """

    def __init__(self, clock: PhaseClock, waited_s: Callable[[], float]) -> None:
        self._clock = clock
        self._waited_s = waited_s

    @contextlib.contextmanager
    def measured(self, step: Step) -> Iterator[None]:
        start_s, before_s = time.perf_counter(), self._waited_s()
        yield
        waited_s = self._waited_s() - before_s
        add_time(self._clock, step, time.perf_counter() - start_s - waited_s)
        self._clock.add("communication", waited_s)


class DeviceStepClock(EventQueue, StepClock):
    """For steps that are queued on a GPU. The watchdog may poll it: a step that never ends is then found, also one that was
    captured in a graph, whose transfers nobody else looks after.

    What a step waits for other ranks counts as its phase: only a trace tells them apart.

    Args:
        clock: where times are added.
        streams: of the device.
        reporting, deadline_s: see EventQueue.
    """

    def __init__(self, clock: PhaseClock, *, streams: Streams, reporting: Reporting, deadline_s: float) -> None:
        super().__init__("steps", 0, 1, Counters(), streams=streams, reporting=reporting, deadline_s=deadline_s)
        self._clock = clock

    @contextlib.contextmanager
    def measured(self, step: Step) -> Iterator[None]:
        current = self._streams.current()
        begin = current.record_event(self._streams.timed_event())
        yield
        end = current.record_event(self._streams.timed_event())
        self.track(DeviceOperation(self, "step", 0, buffers=step, label=f"{step.num_tokens} tokens"), begin, end)
        self.poll(time.perf_counter())

    def _over(self, operation: DeviceOperation) -> None:
        add_time(self._clock, operation.buffers, operation.begin.elapsed_time(operation.end) * 1e-3)
        super()._over(operation)
