"""Who watches the segments of forwards: the mark that names their microbatch in reports, the recorder, NVTX ranges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpcinfer.batch import MicroBatch
from hpcinfer.comm.operation import Mark
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
    """

    def __init__(self, mark: Mark, recorder: Recorder | None = None, nvtx: Any = None) -> None:
        self.mark = mark
        self._recorder = recorder
        self._nvtx = nvtx

    def before_segment(self, parts: Sequence[MicroBatch]) -> BeforeSegment:
        """The callback for forwards of these microbatches, in their order."""
        mark, nvtx = self.mark, self._nvtx

        def before(index: int, after: str) -> None:
            part = parts[index]
            mark.tick, mark.part = part.tick, part.part
            if nvtx is not None:
                nvtx.range_push(f"tick {part.tick} part {part.part}: {f'after {after}' if after else 'begin'}")

        return before

    def on_segment(self, parts: Sequence[MicroBatch]) -> OnSegment | None:
        """The callback for forwards of these microbatches; None where nobody listens."""
        recorder, nvtx = self._recorder, self._nvtx
        if recorder is None and nvtx is None:
            return None

        def ended(index: int, label: str, start_s: float, end_s: float) -> None:
            if nvtx is not None:
                nvtx.mark(label or END)
                nvtx.range_pop()
            if recorder is not None:
                recorder.segment(label or END, start_s, end_s, parts[index].tick, parts[index].part)

        return ended
