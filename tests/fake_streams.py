"""A stand-in for the streams and events of a GPU (`comm.streams`), on threads.

A stream is a thread that does one thing after the other. The computing stream is the host itself: torch computes on the CPU at
once, so an event on it is over when it is recorded, and to wait on it is to block.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time

PATIENCE_S = 60.0


class StandInError(RuntimeError):
    """What NCCL would not have noticed."""


class FakeEvent:
    """Over when its stream has got there."""

    def __init__(self) -> None:
        self.host_clock: int | None = None
        self.time_s = 0.0
        self.error: Exception | None = None
        self._over = threading.Event()

    def finish(self, error: Exception | None) -> None:
        self.time_s, self.error = time.perf_counter(), error
        self._over.set()

    def query(self) -> bool:
        if self.error is not None:
            raise self.error
        return self._over.is_set()

    def elapsed_time(self, end: FakeEvent) -> float:
        return (end.time_s - self.time_s) * 1e3

    def block(self) -> None:
        if not self._over.wait(PATIENCE_S):
            raise StandInError("the computing stream would wait for ever")
        self.query()


class HostStream:
    """The computing stream."""

    cuda_stream = 0

    def __init__(self) -> None:
        self.clock = 0

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        event = event or FakeEvent()
        self.clock += 1
        event.host_clock = self.clock
        event.finish(None)
        return event

    def wait_event(self, event: FakeEvent) -> None:
        event.block()


class FakeStream:
    """A thread that does one thing after the other; after an error it does nothing more."""

    def __init__(self, number: int) -> None:
        self.cuda_stream = number
        self.ordered_behind = -1
        self._work: queue.SimpleQueue = queue.SimpleQueue()
        self._error: Exception | None = None
        threading.Thread(target=self._run, daemon=True, name=f"stream {number}").start()

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        event = event or FakeEvent()
        self._work.put(lambda: event.finish(self._error))
        return event

    def wait_event(self, event: FakeEvent) -> None:
        if event.host_clock is not None:
            self.ordered_behind = event.host_clock
        self.enqueue(event.block)

    def enqueue(self, work) -> None:
        self._work.put(lambda: self._attempt(work))

    def _attempt(self, work) -> None:
        if self._error is None:
            try:
                work()
            except Exception as error:
                self._error = error

    def _run(self) -> None:
        while True:
            self._work.get()()


class FakeStreams:
    """Stands in for `comm.streams.CudaStreams`."""

    def __init__(self) -> None:
        self.host = HostStream()
        self.capturing = False
        self.by_number: dict[int, FakeStream] = {}
        self._numbers = itertools.count(1)

    def current(self) -> HostStream:
        return self.host

    def create(self) -> FakeStream:
        stream = FakeStream(next(self._numbers))
        self.by_number[stream.cuda_stream] = stream
        return stream

    def timed_event(self) -> FakeEvent:
        return FakeEvent()

    def is_capturing(self) -> bool:
        return self.capturing

    def seconds(self, event: FakeEvent) -> float:
        return event.time_s
