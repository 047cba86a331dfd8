"""Operations on a device, from their issue to their end.

An operation of a communicator runs on a stream of its own: it starts when the work that the computing stream has queued so far
is over, and whoever wants its result lets the computing stream, not the host, wait for its end. Nobody polls for that; what is
over is let go of when somebody asks.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from hpcinfer.comm.operation import Mark, Operation, OperationQueue, overdue_error
from hpcinfer.comm.streams import Event, Streams
from hpcinfer.errors import CommunicationError, LostPeerError
from hpcinfer.observe.trace import Recorder

_POLL_S = 0.0005

Launch = Callable[[int], None]
"""Queues an operation on a raw stream."""


class DeviceOperation(Operation):
    """An operation on a stream.

    begin, end: events of its start (where it is timed) and its end.
    blocked: events around the wait of the computing stream, where it is timed.
    """

    __slots__ = ("begin", "end", "blocked")

    def __init__(self, queue: OperationQueue, verb: str, num_bytes: int, **facts: Any) -> None:
        super().__init__(queue, verb, num_bytes, **facts)
        self.begin: Event | None = None
        self.end: Event | None = None
        self.blocked: tuple[Event, Event] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reporting:
    """How the operations of a rank are named in reports, and who records them."""

    mark: Mark
    """The tick and microbatch of what is issued."""
    world_rank: int = 0
    host: str = ""
    recorder: Callable[[], Recorder | None] = lambda: None
    """Returns what to tell of every operation; None records nothing."""


class EventQueue(OperationQueue):
    """Operations that are over when an event is. Nobody need wait for them; the watchdog finds those that never end.

    Args:
        name, rank, size, counters, world_ranks: see OperationQueue.
        streams: of the device.
        reporting: of this rank.
        deadline_s: seconds after its issue at which an operation counts as stuck.
    """

    def __init__(
        self,
        name: str,
        rank: int,
        size: int,
        counters: Any,
        *,
        streams: Streams,
        reporting: Reporting,
        deadline_s: float,
        world_ranks: Sequence[int] = (),
    ) -> None:
        super().__init__(name, rank, size, counters, world_ranks=world_ranks)
        self.deadline_s = deadline_s
        self._streams = streams
        self._reporting = reporting
        self._in_flight: collections.deque[DeviceOperation] = collections.deque()
        self._polling = threading.Lock()

    def track(self, operation: DeviceOperation, begin: Event | None, end: Event) -> None:
        """Number an operation whose work has just been queued, and look after it."""
        self.issue(operation, time.perf_counter(), self._reporting.mark)
        operation.begin, operation.end = begin, end
        if not self._streams.is_capturing():  # the end of a captured operation cannot be asked for
            self._in_flight.append(operation)

    def is_over(self, operation: DeviceOperation) -> bool:
        """True when nothing waits for it any more. Never blocks."""
        return operation.finished or (operation.end is not None and operation.end.query())

    def poll(self, now_s: float) -> CommunicationError | None:
        """Let go of what is over; the failure of the queue, if there is one by now. Any thread may call it."""
        with self._polling:
            if self.failure is not None:
                return self.failure
            try:
                while self._in_flight and self._in_flight[0].end.query():
                    self._over(self._in_flight.popleft())
            except Exception as cause:
                return self.fail(f"the device reports an error on communicator {self.name!r}", cause)
            oldest = self._in_flight[0] if self._in_flight else None
            if oldest is not None and (age_s := now_s - oldest.issued_s) > self.deadline_s:
                described = oldest.describe(self._reporting.world_rank, self._reporting.host)
                self.failure = overdue_error(oldest, described, "queued on the device, and not over", age_s, self.deadline_s)
            return self.failure

    def finish(self) -> None:
        """The host waits until nothing is in flight.

        Raises:
            CommunicationError: something failed, or is not over at its deadline.
        """
        while self._in_flight:
            error = self.poll(time.perf_counter())
            if error is not None:
                raise error
            time.sleep(_POLL_S)

    def fail(self, problem: str, cause: Exception) -> CommunicationError:
        """Take note of a failure; the first one stays."""
        reporting = self._reporting
        self.failure = self.failure or LostPeerError(
            problem,
            found=f"{cause}; world rank {reporting.world_rank}, host {reporting.host or 'unknown'}",
            fix="set NCCL_DEBUG=WARN and start again: NCCL then says more; ranks must issue the same operations in the same order",
        )
        return self.failure

    def _over(self, operation: DeviceOperation) -> None:
        """An operation is over. Under the lock, on any thread."""
        operation.finished = True
        operation.buffers = None


class DeviceQueue(EventQueue):
    """The operations of one communicator on a stream of their own. Arguments as of EventQueue."""

    def __init__(self, name: str, rank: int, size: int, counters: Any, **settings: Any) -> None:
        super().__init__(name, rank, size, counters, **settings)
        self._stream = self._streams.create()

    def start(self, operations: Sequence[DeviceOperation], launch: Launch) -> None:
        """Queue what `launch` puts on the stream as these operations, behind what the current stream has been given."""
        stream = self._stream
        timed = self._reporting.recorder() is not None and not self._streams.is_capturing()
        stream.wait_event(self._streams.current().record_event())
        begin = stream.record_event(self._streams.timed_event()) if timed else None
        try:
            launch(stream.cuda_stream)
        except Exception as cause:
            raise self.fail(f"{operations[0].verb} on communicator {self.name!r} failed", cause) from cause
        end = stream.record_event(self._streams.timed_event() if timed else None)
        for operation in operations:
            self.track(operation, begin, end)

    def order_after(self, operation: DeviceOperation) -> None:
        """The current stream goes on when `operation` is over. The host does not wait."""
        if operation.end is None:
            raise CommunicationError(
                f"wait for {operation.verb} on communicator {self.name!r} before its group has ended",
                fix="wait after the `with group():` block",
            )
        if self.failure is not None:
            raise self.failure
        current = self._streams.current()
        if operation.begin is None:
            current.wait_event(operation.end)
        else:
            before = current.record_event(self._streams.timed_event())
            current.wait_event(operation.end)
            operation.blocked = (before, current.record_event(self._streams.timed_event()))
        # What is allocated from here on is used behind the wait, so the memory may be used again.
        operation.buffers = None

    def _over(self, operation: DeviceOperation) -> None:
        super()._over(operation)
        recorder = self._reporting.recorder()
        if operation.begin is None or recorder is None:
            return
        operation.started_s, operation.ended_s = map(self._streams.seconds, (operation.begin, operation.end))
        recorder.transfer(operation)
        if operation.blocked is not None:
            began_s, ended_s = map(self._streams.seconds, operation.blocked)
            self.counters.wait_s += ended_s - began_s
            recorder.wait(operation, began_s, ended_s)
