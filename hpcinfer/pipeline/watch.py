"""Who watches the segments of forwards: the mark that names their microbatch in reports, the recorder, NVTX ranges."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

from hpcinfer.batch import MicroBatch
from hpcinfer.comm.operation import Mark
from hpcinfer.comm.streams import Event, Streams
from hpcinfer.observe.trace import Recorder
from hpcinfer.pipeline.schedule import BeforeSegment, OnSegment

END = "end"
"""Name of the segment in which a forward ends."""


class SegmentWatch:
    """Makes the callbacks of `pipeline.schedule.interleave` for one step after the other.

    Args:
        mark: of this rank.
        recorder: gets every segment, under the name of the transfer that it ended in.
        nvtx: has range_push, range_pop and mark as torch.cuda.nvtx has them, where a profiler may be listening. A range
            has to be named when it begins: it has the name of the transfer that the segment resumes from, and the
            transfer that it ends in is marked under its own.
        streams: of a GPU, whose work is timed by events: there the host is done with a segment long before the device.
    """

    def __init__(
        self, mark: Mark, recorder: Recorder | None = None, nvtx: Any = None, streams: Streams | None = None
    ) -> None:
        self.mark = mark
        self._recorder = recorder
        self._nvtx = nvtx
        self._streams = streams
        self._begin: Event | None = None
        self._timed: collections.deque[tuple[str, Event, Event, int, int]] = collections.deque()

    def before_segment(self, parts: Sequence[MicroBatch]) -> BeforeSegment:
        """The callback for forwards of these microbatches, in their order."""
        mark, nvtx = self.mark, self._nvtx
        timed = self._streams is not None and self._recorder is not None
        self.harvest()

        def before(index: int, after: str) -> None:
            part = parts[index]
            mark.tick, mark.part = part.tick, part.part
            if nvtx is not None:
                nvtx.range_push(f"tick {part.tick} part {part.part}: {f'after {after}' if after else 'begin'}")
            if timed:
                self._begin = self._now()

        return before

    def on_segment(self, parts: Sequence[MicroBatch]) -> OnSegment | None:
        """The callback for forwards of these microbatches; None where nobody listens."""
        recorder, nvtx = self._recorder, self._nvtx
        if recorder is None and nvtx is None:
            return None

        def ended(index: int, label: str, start_s: float, end_s: float) -> None:
            part = parts[index]
            if nvtx is not None:
                nvtx.mark(label or END)
                nvtx.range_pop()
            if recorder is not None and self._streams is not None:
                self._timed.append((label or END, self._begin, self._now(), part.tick, part.part))
            elif recorder is not None:
                recorder.segment(label or END, start_s, end_s, part.tick, part.part)

        return ended

    def harvest(self) -> None:
        """Record the segments that a GPU has finished."""
        while self._timed and self._timed[0][2].query():
            label, begin, end, tick, part = self._timed.popleft()
            self._recorder.segment(label, self._streams.seconds(begin), self._streams.seconds(end), tick, part)

    def _now(self) -> Event:
        return self._streams.current().record_event(self._streams.timed_event())
