"""Progress of MPI operations: one engine per rank moves everything that this rank has in flight.

MPI libraries move data only while somebody calls them, so a transfer issued before 60 ms of computation has hardly
begun after it. The engine therefore has a background thread that polls every half millisecond while something is
pending. When a caller blocks in `wait()` that caller polls by itself, on its own thread: blocking use costs no
hand-off between threads, and the background thread stays out of the way.

All MPI calls of the hot path are made under the engine's one lock: two threads that test one request at the same time
end in an internal MPI error (FACTS: MPICH 5.0.2).
"""

from __future__ import annotations

import atexit
import os
import threading
import time

from hpcinfer.comm.operation import Mark, MpiOperation, OperationQueue, overdue_error
from hpcinfer.errors import CommunicationError, LostPeerError
from hpcinfer.observe.trace import Recorder

POLL_S = 0.0005
"""Period of the background thread, and the longest sleep of a waiting caller."""
SPIN_S = 20e-6
"""A waiting caller polls without pause for so long (not at all where ranks share cores)."""
YIELD_S = 0.001
"""Then it gives its core away between polls for so long, and after that it sleeps between polls."""
PARK_AFTER = 40
"""The background thread goes to sleep for good after so many periods without work; the next operation wakes it."""


class ProgressEngine:
    """Starts, polls and waits for the operations of all communicators of this rank.

    Args:
        rank, host: of this process in the world, for error reports.
        oversubscribed: there are more ranks than cores on this node: a waiting caller gives its core away at once.
    """

    def __init__(self, *, rank: int = 0, host: str = "", oversubscribed: bool = False) -> None:
        self.rank = rank
        self.host = host
        self.mark = Mark()
        """What this rank is working on."""
        self.recorder: Recorder | None = None
        """Told of every operation and every wait."""
        self._spin_s = 0.0 if oversubscribed else SPIN_S
        self._lock = threading.RLock()
        self._pending: list[MpiOperation] = []
        self._abandoned: list[MpiOperation] = []
        self._waiting = 0
        self._parked = False
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="hpcinfer-progress", daemon=True)
        self._thread.start()
        atexit.register(self._stop)

    # -- for communicators --------------------------------------------------------------------------------------------

    def submit(self, queue: OperationQueue, batch: list[MpiOperation]) -> None:
        """Issue the operations of `batch`, which start together: now, or in strict mode when their turn comes."""
        if self._closing:
            raise CommunicationError(f"{batch[0].verb} on {queue.name!r}", found="the progress engine has been closed")
        if queue.failure is not None:
            raise queue.failure
        now = time.perf_counter()
        for operation in batch:
            queue.issue(operation, now, self.mark)
        with self._lock:
            queue.in_flight += len(batch)
            if queue.strict:
                queue.batches.append(batch)
                if len(queue.batches) == 1:
                    self._start(batch)
            else:
                self._start(batch)
            if self._parked:
                self._parked = False
                self._wake.set()

    def poll(self) -> None:
        """Move whatever can move, once. Never blocks for long."""
        with self._lock:
            self._poll()

    def wait(self, operation: MpiOperation, deadline_s: float) -> None:
        """Block until `operation` is over.

        Raises:
            CommunicationError: it failed, or was not over after `deadline_s` seconds of waiting.
        """
        if not operation.finished:
            began = time.perf_counter()
            try:
                self._wait(operation, deadline_s, began)
            finally:
                ended = time.perf_counter()
                operation.queue.counters.wait_s += ended - began
                if self.recorder is not None:
                    self.recorder.wait(operation, began, ended)
        if operation.error is not None:
            raise operation.error

    def finish(self, queue: OperationQueue, deadline_s: float) -> None:
        """Block until nothing of `queue` is in flight, also what nobody holds a handle of any more."""
        while queue.in_flight:
            with self._lock:
                mine = [operation for operation in self._pending if operation.queue is queue]
            for operation in mine:
                self.wait(operation, deadline_s)

    def abandon(self, queue: OperationQueue, error: CommunicationError) -> None:
        """Give up all operations of `queue`. Their buffers stay alive: MPI may still write to them."""
        with self._lock:
            mine = [operation for operation in self._pending if operation.queue is queue]
            self._abandoned += mine
            self._pending = [operation for operation in self._pending if operation.queue is not queue]
            for operation in mine + [operation for batch in queue.batches for operation in batch]:
                operation.finished = True
                operation.error = operation.error or error
            queue.batches.clear()
            queue.in_flight = 0
            queue.failure = error

    def close(self) -> None:
        """End the background thread and wait for it. Nothing more can be issued afterwards."""
        atexit.unregister(self._stop)
        self._stop()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _wait(self, operation: MpiOperation, deadline_s: float, began: float) -> None:
        lock = self._lock
        pause_s = 20e-6
        with lock:
            self._waiting += 1
            self._poll()
        try:
            while not operation.finished:
                waited_s = time.perf_counter() - began
                if waited_s > self._spin_s:
                    if waited_s < YIELD_S:
                        os.sched_yield()
                    elif waited_s > deadline_s:
                        raise self._overdue(operation, waited_s, deadline_s)
                    else:
                        time.sleep(pause_s)
                        pause_s = min(POLL_S, pause_s * 1.25)
                with lock:
                    self._poll()
        finally:
            with lock:
                self._waiting -= 1

    def _start(self, batch: list[MpiOperation]) -> None:
        for operation in batch:
            operation.started_s = time.perf_counter()
            try:
                operation.requests = list(operation.start())
            except Exception as cause:
                self._fail(operation, cause)
            self._pending.append(operation)

    def _poll(self) -> None:
        over = None
        for operation in self._pending:
            if not operation.finished:
                try:
                    if not operation.test():
                        continue
                except Exception as cause:
                    self._fail(operation, cause)
            over = over or []
            over.append(operation)
        if over:
            for operation in over:
                self._over(operation)
            # A new list, and only now: an operation whose turn has come is appended below.
            self._pending = [operation for operation in self._pending if not operation.ended_s]
            for operation in over:
                self._advance(operation.queue)

    def _over(self, operation: MpiOperation) -> None:
        """The one place where start and end of every operation are known."""
        operation.ended_s = time.perf_counter()
        operation.buffers = operation.start = None  # `start` refers to the buffers too
        operation.queue.in_flight -= 1
        if self.recorder is not None:
            self.recorder.transfer(operation)
        operation.finished = True

    def _advance(self, queue: OperationQueue) -> None:
        while queue.batches and all(operation.ended_s for operation in queue.batches[0]):
            queue.batches.popleft()
            if queue.batches:
                self._start(queue.batches[0])

    def _fail(self, operation: MpiOperation, cause: Exception) -> None:
        queue = operation.queue
        operation.error = LostPeerError(
            f"{operation.verb} on communicator {queue.name!r} failed",
            found=f"{cause}; {self._describe(operation)}",
            fix="ranks must issue the same operations, with the same shapes and dtypes, in the same order",
        )
        operation.error.__cause__ = cause
        operation.finished = True
        queue.failure = queue.failure or operation.error

    def _overdue(self, operation: MpiOperation, waited_s: float, deadline_s: float) -> CommunicationError:
        queue = operation.queue
        if operation.requests is None:
            ahead = next((o for batch in queue.batches for o in batch if not o.finished), operation)
            state = f"not started: {self._describe(ahead)} is still ahead of it"
        else:
            state = "started, and the other side has not taken part"
        error = overdue_error(operation, self._describe(operation), state, waited_s, deadline_s)
        queue.failure = queue.failure or error
        return error

    def _describe(self, operation: MpiOperation) -> str:
        return operation.describe(self.rank, self.host)

    def _run(self) -> None:
        idle_periods = 0
        while not self._closing:
            time.sleep(POLL_S)
            if self._waiting:
                idle_periods = 0
            elif self._pending:
                idle_periods = 0
                if self._lock.acquire(blocking=False):
                    try:
                        self._poll()
                    finally:
                        self._lock.release()
            else:
                idle_periods += 1
                if idle_periods > PARK_AFTER:
                    idle_periods = 0
                    self._park()

    def _park(self) -> None:
        with self._lock:
            if self._pending or self._closing:
                return
            self._wake.clear()
            self._parked = True
        self._wake.wait()

    def _stop(self) -> None:
        with self._lock:
            self._closing = True
            self._parked = False
            self._wake.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
