"""What one rank did and when: records of computation, transfers, waits and host work, kept in memory until the end.

A record is one tuple appended to a deque; nothing is written while a run goes on. Whoever records holds a `Recorder | None`
and asks `if recorder is not None`, so that a run without one pays nothing.

Times are seconds of time.perf_counter, which is one clock for all processes of a host. Between hosts the offset to rank 0
is in the header of the file (see `observe.trace_file`).
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

compute: a segment of a forward, or the drawing of tokens. transfer: one operation of a communicator, from its start to the
poll that found it over; others may overlap it. wait: this rank was blocked in an operation. tick: the message and the schedule of a tick, and
its execution as a whole. host: reading, tokenising, committing and the like. idle: nothing to do (no message from the leader yet, no rows, the end).
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
    """compute: the label of the transfer that the segment ended in ("layer 3 o"), "end" where the forward ended. transfer
    and wait: the transfer's label."""
    start_s: float
    end_s: float
    tick: int = NO_TICK
    part: int = WHOLE_STEP
    verb: str = ""
    bytes: int = 0
    """Of this rank's tensor."""
    peer: int = -1
    """The other rank of a send or recv, the root of a broadcast, in the communicator; -1 where all take part alike."""
    issued_s: float = 0.0
    number: int = 0
    """Counts the operations of this communicator on this rank, in the order of their issue, from 1."""
    dtype: str = ""
    shape: tuple[int, ...] = ()


class Recorder:
    """The records of one rank. Cheap enough to stay on in a production run; see `Record` for the columns.

    Args:
        max_records: the oldest are dropped beyond it.
    """

    def __init__(self, max_records: int = MAX_RECORDS) -> None:
        self.start_s = time.perf_counter()
        self.records: collections.deque[tuple] = collections.deque(maxlen=max_records)
        self.num_added = 0
        """Records of this rank's main thread and of finished transfers, dropped ones included."""
        self._resumed_s = 0.0
        self._dtypes: dict[Any, str] = {}

    # -- computation and host work -----------------------------------------------------------------------------------

    def segment(self, name: str, start_s: float, end_s: float, tick: int, part: int) -> None:
        """A segment of a forward. It began when the wait for its transfer was over: what is left to do with the result
        (sums, copies) is computation too."""
        if self._resumed_s:
            start_s = min(start_s, self._resumed_s)
            self._resumed_s = 0.0
        self._add((COMPUTE, "", name, start_s, end_s, tick, part))

    def add(self, kind: int, name: str, start_s: float, *, tick: int = NO_TICK) -> None:
        """Something of the main thread that began at `start_s` and ends now. Waits inside it record themselves."""
        self._add((kind, "", name, start_s, time.perf_counter(), tick))

    # -- communication; `operation` is a comm.operation.Operation -----------------------------------------------------

    def transfer(self, operation: Any) -> None:
        """An operation that is over. Called under the progress engine's lock, on any thread."""
        queue = operation.queue
        self._add((
            TRANSFER, queue.name, operation.label, operation.started_s, operation.ended_s, operation.tick, operation.part,
            operation.verb, operation.num_bytes, -1 if operation.peer is None else operation.peer, operation.issued_s,
            operation.number, self._dtype(operation.dtype), tuple(operation.shape),
        ))

    def wait(self, operation: Any, start_s: float, end_s: float) -> None:
        """This rank was blocked in `operation`: exposed communication, or idle where it waited to be told what to do."""
        queue, peer = operation.queue, operation.peer
        self._resumed_s = end_s
        told = queue.name == "world" or (queue.name == "control" and peer is not None and peer != queue.rank)
        self._add((
            IDLE if told else WAIT, queue.name, operation.label, start_s, end_s, operation.tick, operation.part,
            operation.verb, operation.num_bytes, -1 if peer is None else peer, operation.issued_s, operation.number,
        ))

    def _add(self, record: tuple) -> None:
        self.num_added += 1
        self.records.append(record)

    def _dtype(self, dtype: Any) -> str:
        name = self._dtypes.get(dtype)
        if name is None:
            name = self._dtypes[dtype] = "" if dtype is None else str(dtype).removeprefix("torch.")
        return name


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
