"""Streams and events of a GPU, as far as communicators use them.

Work on a stream happens in order; an event marks a place in it. A stream that waits for an event leaves the host free. Only
`CudaStreams` touches a device: communicators get an object with its methods, so that their tests need none.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

import torch

_ANCHOR_S = 10.0
"""So long the times of events are told from one event; then from a newer one."""


class Event(Protocol):
    """A place in the work of a stream."""

    def query(self) -> bool:
        """True when everything before it is over. Never blocks. Not allowed while a graph is captured."""

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to `end`; both were made with timing and are over."""


class Stream(Protocol):
    """Work of a device, in order."""

    cuda_stream: int
    """The raw stream, as NCCL takes it."""

    def wait_event(self, event: Event) -> None:
        """Whatever is queued from now on starts after `event`."""

    def record_event(self, event: Event | None = None) -> Event:
        """Mark the end of what is queued so far."""


class Streams(Protocol):
    """The streams of one device."""

    def current(self) -> Stream:
        """The stream on which the calling thread computes."""

    def create(self) -> Stream:
        """A new stream."""

    def timed_event(self) -> Event:
        """An event whose time can be read."""

    def is_capturing(self) -> bool:
        """True while the calling thread's work goes into a graph instead of to the device."""

    def seconds(self, event: Event) -> float:
        """When a timed event happened, in seconds of time.perf_counter."""


class CudaStreams:
    """The streams of one GPU, made by torch.

    Args:
        device: a CUDA device with its number.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._anchor: tuple[torch.cuda.Event, float] | None = None
        self._anchoring = threading.Lock()

    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def create(self) -> torch.cuda.Stream:
        # The highest priority: a transfer that is late delays every rank, a kernel that is late its own only.
        return torch.cuda.Stream(self._device, priority=-1)

    def timed_event(self) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def seconds(self, event: torch.cuda.Event) -> float:
        anchor, anchor_s = self._recent_anchor()
        # The anchor may be the later of the two: elapsed_time is then negative, and right.
        return anchor_s + anchor.elapsed_time(event) * 1e-3

    def _recent_anchor(self) -> tuple[torch.cuda.Event, float]:
        """An event and its time. Elapsed times are float32 milliseconds: over a minute they have steps of 4 us, over an hour of 250."""
        with self._anchoring:  # the watchdog asks too
            if self._anchor is None or time.perf_counter() - self._anchor[1] > _ANCHOR_S:
                event = self.timed_event()
                torch.cuda.Stream(self._device).record_event(event)
                event.synchronize()
                self._anchor = event, time.perf_counter()
            return self._anchor
