"""The segment writer: keeps finished rows in memory, and has them committed as segments while the loop goes on."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence

from hpcinfer.data import optional_columns
from hpcinfer.data.generation_table import GenerationTable
from hpcinfer.data.ledger.commit import is_transient
from hpcinfer.data.ledger.committer import Committer
from hpcinfer.data.ledger.run_directory import RunDirectory, unusable
from hpcinfer.data.ledger.segment_store import Segment, SegmentStore
from hpcinfer.errors import ResumableError
from hpcinfer.request import Generation, Status
from hpcinfer.units import format_bytes

_FILES_TARGET = 16_000
_ROW_OVERHEAD_BYTES = 64


def segment_limit(num_writers: int) -> int:
    """Small segments that one writer may keep before it compacts them, so that all together stay under about 20,000
    files.
    """
    return min(256, max(4, _FILES_TARGET // max(1, num_writers)))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SegmentPolicy:
    """When rows are committed, how long a full disk is waited for, and how segments are compacted."""

    max_rows: int = 4096
    """A segment is committed at this many rows. Default 4096."""
    max_bytes: int = 16 * 2**20
    """... or at about this many bytes. Default 16 MiB."""
    max_age_s: float = 30.0
    """... or when its oldest row has waited this long. Default 30 s: what a kill can cost."""
    retry_s: float = 300.0
    """How long rows are kept in memory while the storage refuses them, before the run ends as resumable. Default 300
    s.
    """
    backoff_s: float = 0.5
    """Wait before the first retry; it doubles up to 30 s. Default 0.5 s."""
    max_queued: int = 4
    """Segments on their way to the storage. While there are so many `add` waits, unless the storage refuses. Default
    4.
    """
    max_buffer_bytes: int = 2**30
    """Rows waiting for a storage that refuses may take this much memory. Default 1 GiB."""
    max_segments: int = 64
    """Small segments kept before they are compacted into larger ones. Default 64; see `segment_limit`."""
    compact_bytes: int = 64 * 2**20
    """Size of a compacted segment; one of half this size is not compacted again. Default 64 MiB."""


class SegmentWriter:
    """Commits the generations of one writer, in a background thread.

    `add` hands full segments over and returns. It waits only while `policy.max_queued` segments are on their way and
    the storage takes them; while the storage refuses (full, over quota, I/O error) rows stay in memory, and the thread
    tries again with a back-off. `flush` waits until everything is on disk.

    Rows are counted (`num_ok` ...), and `on_commit(name, table)` is called (for `Coverage.add_table`), only when they
    are on disk: in the next `add`, `poll`, `flush` or `close`, in the order of the segments, by the thread that calls.

    The same calls raise what went wrong in the background: ResumableError when the storage has refused for
    `policy.retry_s` or the memory for waiting rows is used up; RunDirectoryError when it refuses for a reason that
    waiting cannot cure (no permission, folder gone). Rows are kept, and `flush` tries once more.
    """

    def __init__(
        self,
        run: RunDirectory,
        writer_id: str,
        policy: SegmentPolicy = SegmentPolicy(),
        *,
        on_commit: Callable[[str, GenerationTable], None] = lambda name, table: None,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[threading.Condition, float], object] = threading.Condition.wait,
    ) -> None:
        """`wait`: how the thread waits in a back-off, on a condition that it holds, for so many seconds."""
        self._run = run
        self._policy = policy
        self._on_commit = on_commit
        self._clock = clock
        self._store = SegmentStore(
            run, writer_id, max_segments=policy.max_segments, compact_bytes=policy.compact_bytes
        )
        self._committer = Committer(
            self._store, retry_s=policy.retry_s, backoff_s=policy.backoff_s, clock=clock, wait=wait
        )
        self._buffer: list[Generation] = []
        self._buffer_bytes = 0
        self._oldest_at = 0.0
        self.num_waiting = 0
        """Rows that were added and are not counted as committed."""
        self.num_ok = 0
        """(row, sample) committed as ok."""
        self.num_failed = 0
        """(row, sample) committed as failed."""
        self.num_partial = 0
        """(row, sample) committed as partial."""
        self.commit_wait_s = 0.0
        """Seconds in which `add`, `flush` and `close` waited for commits; what is left of `commit_s` was hidden."""

    @property
    def num_committed(self) -> int:
        """Rows committed, partial ones included."""
        return self.num_ok + self.num_failed + self.num_partial

    @property
    def is_refused(self) -> bool:
        """Whether the storage refuses commits at the moment."""
        return self._committer.failing_since is not None

    @property
    def num_retries(self) -> int:
        """Commits that the storage refused."""
        return self._committer.num_retries

    @property
    def num_compactions(self) -> int:
        """Compacted segments written."""
        return self._store.num_compactions

    @property
    def commit_s(self) -> float:
        """Seconds in which segments were built, committed and compacted in the background."""
        return self._committer.commit_s

    def add(self, generations: Sequence[Generation]) -> None:
        """Takes finished (or, when draining, partial) rows, and has them committed when a threshold is reached."""
        if generations and not self._buffer:
            self._oldest_at = self._clock()
        self._buffer.extend(generations)
        self._buffer_bytes += _num_bytes(generations)
        self.num_waiting += len(generations)
        self.poll()

    def poll(self) -> None:
        """Counts what was committed, and has committed what has waited long enough. To be called between steps."""
        self._collect()
        self._cut(force=False)
        if self.is_refused:
            waiting_bytes = self._buffer_bytes + self._committer.num_bytes
            if waiting_bytes > self._policy.max_buffer_bytes:
                raise self._give_up(f"{format_bytes(waiting_bytes)} wait in memory")

    def flush(self) -> None:
        """Commits everything, waiting for the storage for at most `policy.retry_s` since it first refused."""
        self._collect()
        self._committer.hurry()
        self._committer.start()
        self._cut(force=True)
        self._wait_for(lambda: not self._committer.is_running)
        self._committer.join()
        self._collect()

    def close(self) -> None:
        """`flush`, then leaves as few segments behind as compaction allows."""
        self.flush()
        began = self._clock()
        try:
            self._store.compact(minimum=8)
        except OSError as error:
            raise unusable(self._run.path, error) from error
        self.commit_wait_s += self._clock() - began

    def stop(self, timeout_s: float = 5.0) -> None:
        """For a life that ends by an error: what is on its way is tried without retries, for at most `timeout_s`, and
        is not counted. Raises nothing; nothing to do after `close`.
        """
        self._committer.stop(timeout_s)

    def _cut(self, *, force: bool) -> None:
        """Makes segments of the buffer, as far as the queue takes them; all of it with `force`."""
        while self._buffer and (force or self._is_due()):
            if not self._has_room():
                self._wait_for(
                    lambda: self._has_room() or self._committer.has_failed or (self.is_refused and not force)
                )
                self._collect()
                if not self._has_room():
                    return
            taken = self._buffer[: self._policy.max_rows]
            del self._buffer[: self._policy.max_rows]
            num_bytes = _num_bytes(taken) if self._buffer else self._buffer_bytes
            self._buffer_bytes -= num_bytes
            self._committer.put(Segment(taken, num_bytes))

    def _is_due(self) -> bool:
        return (
            len(self._buffer) >= self._policy.max_rows
            or self._buffer_bytes >= self._policy.max_bytes
            or self._clock() - self._oldest_at >= self._policy.max_age_s
        )

    def _has_room(self) -> bool:
        return self._committer.num_queued < self._policy.max_queued

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        began = self._clock()
        self._committer.wait_for(condition)
        self.commit_wait_s += self._clock() - began

    def _collect(self) -> None:
        """Counts what was committed, then raises what went wrong."""
        for segment in self._committer.take_committed():
            self.num_waiting -= len(segment.table)
            status = segment.table.status
            self.num_ok += int((status == Status.OK).sum())
            self.num_failed += int((status == Status.FAILED).sum())
            self.num_partial += int((status == Status.PARTIAL).sum())
            self._on_commit(segment.name, segment.table)
        error = self._committer.take_failure()
        if error is None:
            return
        if not isinstance(error, OSError):
            raise error
        if not is_transient(error):
            raise unusable(self._run.path, error) from error
        refused_s = self._clock() - self._committer.failing_since
        raise self._give_up(f"refused for {refused_s:.0f} s") from error

    def _give_up(self, why: str) -> ResumableError:
        error = self._committer.refusal
        return ResumableError(
            f"{self.num_waiting} rows cannot be written to {self._run.segments}: {error.strerror or error}",
            found=f"{why}; {self.num_committed} rows of this life are committed",
            fix="free space or quota and start the same job again; it goes on from what is committed",
        )


def _num_bytes(generations: Sequence[Generation]) -> int:
    """About the memory that rows take."""
    return sum(
        _ROW_OVERHEAD_BYTES + len(g.text) + 4 * len(g.token_ids) + len(g.error) + optional_columns.num_bytes(g) for g in generations
    )
