"""The first-in-first-out schedule of forwards: while one waits for its transfer, the others compute.

Forwards take turns. A turn waits for the transfer that the forward has left pending, and computes until it leaves the next
one. So with two forwards the transfer of one is in flight while the other computes, and every rank that drives the same
forwards issues the same transfers in the same order, which collectives need: another order gives silently wrong sums.

The k-th segment of a forward always comes before the k-th segment of a later one; the forwards of a step have equally many
in each layer, whatever their tokens are (a turn without a transfer yields a finished handle). Two chunks of one prompt may therefore
interleave: the earlier chunk's keys and values of a layer are in the pages before the later one's attention reads them.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Sequence

import torch

from hpcinfer.comm.communicator import Handle
from hpcinfer.parallel.segments import Segments

OnSegment = Callable[[int, str, float, float], None]
"""Called after each segment with the forward's number, what the segment ended in (the label of the transfer it issued, ""
for the end of the forward), and its start and end in seconds of time.perf_counter."""
BeforeSegment = Callable[[int, str], None]
"""Called before each segment with the forward's number and the label of the transfer it resumes from, "" at its start."""


def interleave(
    forwards: Sequence[Segments],
    *,
    between: Callable[[], None] | None = None,
    before_segment: BeforeSegment | None = None,
    on_segment: OnSegment | None = None,
) -> list[torch.Tensor]:
    """Drive the forwards to their ends, in turns. Returns their results in order.

    Args:
        between: called before each turn; it must not block.
        before_segment: marks what the forward issues; on_segment: records computation. None costs nothing.
    """
    results: list[torch.Tensor | None] = [None] * len(forwards)
    turns: collections.deque[tuple[int, Handle | None]] = collections.deque(
        (index, None) for index in range(len(forwards))
    )
    while turns:
        index, handle = turns.popleft()
        if between is not None:
            between()
        arrived = None if handle is None else handle.wait()
        if before_segment is not None:
            before_segment(index, "" if handle is None else handle.label)
        start_s = time.perf_counter() if on_segment else 0.0
        label = ""
        try:
            pending = forwards[index].send(arrived)
            label = pending.label
            turns.append((index, pending))
        except StopIteration as end:
            results[index] = end.value
        if on_segment is not None:
            on_segment(index, label, start_s, time.perf_counter())
    return results
