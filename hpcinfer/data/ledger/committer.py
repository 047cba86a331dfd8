"""The thread that commits segments while the main thread computes."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable

from hpcinfer.data.ledger.commit import is_transient
from hpcinfer.data.ledger.segment_store import Segment, SegmentStore

_LONGEST_BACKOFF_S = 30.0


class Committer:
    """Commits segments in the order in which they are put, one at a time, in a thread that lives only while there are
    some. It tries again what the storage refuses for a while.

    All methods are for the main thread; the store belongs to the thread while `is_running`. What a segment's commit
    changes for the run (counts, the ledger) is done by the main thread, with what `take_committed` gives. Whatever
    ends the thread before its time is kept for `take_failure`; what was not committed stays in the queue.

    Building a segment is part of the thread's work: it shares the interpreter and HDF5's lock with the loop, which on
    average costs the loop about as much as building it itself, and less while kernels run without the interpreter; but
    the longest stall of a step is about halved.

    Args:
        retry_s: how long the storage may refuse.
        backoff_s: wait before the first retry; it doubles up to 30 s.
        clock: seconds.
        wait: waits on a condition (held) for so many seconds, or less when it is notified.
    """

    def __init__(
        self,
        store: SegmentStore,
        *,
        retry_s: float,
        backoff_s: float,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[threading.Condition, float], object] = threading.Condition.wait,
    ) -> None:
        self._store = store
        self._retry_s = retry_s
        self._first_backoff_s = backoff_s
        self._backoff_s = backoff_s
        self._clock = clock
        self._wait = wait
        # Guards all that follows; notified at each change that somebody may wait for.
        self._changed = threading.Condition()
        self._queue: collections.deque[Segment] = collections.deque()
        self._committed: list[Segment] = []
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._is_hurried = False
        self._is_stopping = False
        self.is_running = False
        """Whether the thread has something to do."""
        self.failing_since: float | None = None
        """When the storage first refused what it still refuses."""
        self.refusal: OSError | None = None
        """Its last refusal."""
        self.num_retries = 0
        """Attempts that the storage refused."""
        self.commit_s = 0.0
        """Seconds in which the thread built, committed and compacted segments; the back-off is not in it."""

    @property
    def num_queued(self) -> int:
        """Segments not committed."""
        return len(self._queue)

    @property
    def num_bytes(self) -> int:
        """About the memory that the segments in the queue take."""
        with self._changed:
            return sum(segment.num_bytes for segment in self._queue)

    @property
    def has_failed(self) -> bool:
        """Whether `take_failure` has something."""
        return self._failure is not None

    def put(self, segment: Segment) -> None:
        """Takes a segment, at once."""
        with self._changed:
            self._queue.append(segment)
        self.start()

    def start(self) -> None:
        """Starts the thread where there is work for it: also again, after a failure was taken."""
        with self._changed:
            if self.is_running or self.has_failed or not self._queue:
                return
            self._is_stopping = False
            self._thread = threading.Thread(target=self._work, name="commit", daemon=True)
            self._thread.start()
            self.is_running = True

    def hurry(self) -> None:
        """Ends a back-off: what was refused is tried now."""
        with self._changed:
            self._is_hurried = True
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[], bool], timeout_s: float | None = None) -> None:
        """Waits until `condition` of this object holds, at most `timeout_s`."""
        with self._changed:
            self._changed.wait_for(condition, timeout_s)

    def join(self) -> None:
        """Sees the thread gone; to be called when it is not running."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def stop(self, timeout_s: float) -> None:
        """Lets the thread try each segment in the queue without retries, and waits for it, at most `timeout_s`."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self.is_running, timeout_s)

    def take_committed(self) -> list[Segment]:
        """What was committed since the last call, in order."""
        with self._changed:
            taken, self._committed = self._committed, []
        return taken

    def take_failure(self) -> BaseException | None:
        """What ended the thread: an OSError that is transient when the storage has refused for `retry_s`."""
        with self._changed:
            failure, self._failure = self._failure, None
        return failure

    # The thread -----------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while (segment := self._next()) is not None:
                self._commit(segment)
        except BaseException as error:  # of whatever kind: the main thread raises it
            with self._changed:
                self._failure = error
                self.is_running = False
                self._changed.notify_all()

    def _next(self) -> Segment | None:
        with self._changed:
            if self._queue:
                return self._queue[0]
            self.is_running = False
            self._changed.notify_all()
            return None

    def _commit(self, segment: Segment) -> None:
        began = self._clock()
        try:
            self._store.commit(segment)
        except OSError as error:
            self.commit_s += self._clock() - began
            self._refused(error)
            return
        segment.rows, segment.image = (), b""
        with self._changed:
            self._queue.popleft()
            self._committed.append(segment)
            self.failing_since = None
            self._backoff_s = self._first_backoff_s
            self._changed.notify_all()
        self._store.compact_when_due()
        self.commit_s += self._clock() - began

    def _refused(self, error: OSError) -> None:
        """Waits before the next attempt; raises `error` where there is to be none."""
        if not is_transient(error):
            raise error
        now = self._clock()
        with self._changed:
            self.num_retries += 1
            self.refusal = error
            if self.failing_since is None:
                self.failing_since = now
            self._changed.notify_all()
            remaining = self._retry_s - (now - self.failing_since)
            if remaining <= 0:
                raise error
            retry_at = now + min(self._backoff_s, remaining)
            self._backoff_s = min(_LONGEST_BACKOFF_S, 2 * self._backoff_s)
            self._is_hurried = False
            while not (self._is_hurried or self._is_stopping) and self._clock() < retry_at:
                self._wait(self._changed, retry_at - self._clock())
            if self._is_stopping:
                raise error
