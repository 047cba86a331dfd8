"""What one rank did and when: records of computation, transfers, waits and host work, kept in memory until the end.

To record is to append to a deque; nothing is written while a run goes on. Whoever records holds a `Recorder | None` and
asks `if recorder is not None`, so that a run without one pays nothing.

Times are seconds of time.perf_counter, which is one clock for all processes of a host. Between hosts the offset to rank
0 is in the header of the file (see `observe.trace_file`).
"""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

COMPUTE, TRANSFER, WAIT, TICK, HOST, IDLE = range(6)
KINDS = ("compute", "transfer", "wait", "tick", "host", "idle")
"""What a record is about.

compute: a segment of a forward, or the drawing of tokens. transfer: one operation of a communicator, from its start to
the poll that found it over; others may overlap it. wait: this rank was blocked in an operation. tick: the message and
the schedule of a tick, and its execution as a whole. host: reading, tokenising, committing and the like. idle: nothing
to do (no message from the leader yet, no rows, the end).
"""
MAX_RECORDS = 1_000_000
"""The newest records are kept, about 300 bytes each."""
WHOLE_STEP = -1
"""Part of what belongs to a tick and to no microbatch of it."""
NO_TICK = -1


class Record(NamedTuple):
    """One record, with the columns of a trace file."""

    kind: int
    track: str
    """Name of the communicator; "" for what is none."""
    name: str
    """compute: the label of the transfer that the segment ended in ("layer 3 o"), "end" where the forward ended.
    transfer and wait: the transfer's label."""
    start_s: float
    end_s: float
    tick: int = NO_TICK
    part: int = WHOLE_STEP
    verb: str = ""
    bytes: int = 0
    """Of this rank's tensor."""
    peer: int = -1
    """Rank in the communicator: the other end of a send or recv, the root of a broadcast; -1 where all are alike."""
    issued_s: float = 0.0
    number: int = 0
    """Counts the operations of this communicator on this rank, in the order of their issue, from 1."""
    dtype: str = ""
    shape: tuple[int, ...] = ()


class Recorder:
    """The records of one rank. Cheap enough to stay on in a production run: what is kept of an operation is the
    operation itself, and everything else is worked out in `rows`.

    Args:
        max_records: the oldest are dropped beyond it.
    """

    def __init__(self, max_records: int = MAX_RECORDS) -> None:
        self.start_s = time.perf_counter()
        self.max_records = max_records
        self._kept: collections.deque[Any] = collections.deque(maxlen=max_records)
        self._resumed_s = 0.0
        self.transfer = self._kept.append
        """Keep a comm.operation.Operation that is over. Called under the progress engine's lock, on any thread."""

    def segment(self, name: str, start_s: float, end_s: float, tick: int, part: int) -> None:
        """A segment of a forward. It began when the wait for its transfer was over: what is left to do with the result
        (sums, copies) is computation too."""
        if self._resumed_s:
            start_s = min(start_s, self._resumed_s)
            self._resumed_s = 0.0
        self._kept.append((COMPUTE, "", name, start_s, end_s, tick, part))

    def add(self, kind: int, name: str, start_s: float, *, tick: int = NO_TICK) -> None:
        """Something of the main thread that began at `start_s` and ends now. Waits inside it record themselves."""
        self._kept.append((kind, "", name, start_s, time.perf_counter(), tick))

    def wait(self, operation: Any, start_s: float, end_s: float) -> None:
        """This rank was blocked in `operation`: exposed, or idle where it waited to be told what to do."""
        self._resumed_s = end_s
        self._kept.append((operation, start_s, end_s))

    def restart(self) -> None:
        """Forget everything; the trace begins now."""
        self._kept.clear()
        self._resumed_s = 0.0
        self.start_s = time.perf_counter()

    @property
    def is_full(self) -> bool:
        """True where records may have been dropped."""
        return len(self._kept) >= self.max_records

    def rows(self) -> list[Record]:
        """All records, by start."""
        rows = []
        for kept in self._kept:
            if not isinstance(kept, tuple):
                rows.append(_of_operation(TRANSFER, kept, kept.started_s, kept.ended_s))
            elif len(kept) == 3:
                rows.append(_of_operation(_kind_of_wait(kept[0]), *kept))
            else:
                rows.append(Record(*kept))
        return sorted(rows, key=lambda row: row.start_s)


def _of_operation(kind: int, operation: Any, start_s: float, end_s: float) -> Record:
    return Record(
        kind, operation.queue.name, operation.label, start_s, end_s, operation.tick, operation.part, operation.verb,
        operation.num_bytes, -1 if operation.peer is None else operation.peer, operation.issued_s, operation.number,
        "" if operation.dtype is None else str(operation.dtype).removeprefix("torch."), tuple(operation.shape),
    )


def _kind_of_wait(operation: Any) -> int:
    queue, peer = operation.queue, operation.peer
    told = queue.name == "world" or (queue.name == "control" and peer is not None and peer != queue.rank)
    return IDLE if told else WAIT


@contextlib.contextmanager
def _recorded(recorder: Recorder, name: str, kind: int, tick: int) -> Iterator[None]:
    start_s = time.perf_counter()
    try:
        yield
    finally:
        recorder.add(kind, name, start_s, tick=tick)


_NOTHING = contextlib.nullcontext()


def span(
    recorder: Recorder | None, name: str, kind: int = HOST, *, tick: int = NO_TICK
) -> contextlib.AbstractContextManager[None]:
    """Record what is inside a `with` block; nothing where there is no recorder."""
    return _NOTHING if recorder is None else _recorded(recorder, name, kind, tick)
