"""The segment writer: keeps finished rows in memory, commits them as segments, and compacts its own segments."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hpcinfer.data.ledger.commit import commit_bytes, fsync_folder, is_transient, remove_quietly
from hpcinfer.data.ledger.coverage import segment_name
from hpcinfer.data.generation_table import GenerationTable
from hpcinfer.data.generations import GenerationFile, encode_table
from hpcinfer.data.ledger.run_directory import RunDirectory, unusable
from hpcinfer.errors import DataError, ResumableError
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
    max_buffer_bytes: int = 2**30
    """Rows waiting for the storage may take this much memory. Default 1 GiB."""
    max_segments: int = 64
    """Small segments kept before they are compacted into larger ones. Default 64; see `segment_limit`."""
    compact_bytes: int = 64 * 2**20
    """Size of a compacted segment; one of half this size is not compacted again. Default 64 MiB."""


@dataclasses.dataclass(slots=True)
class _Pending:
    """A segment on its way to the disk: the same name and bytes at every attempt."""

    name: str
    image: bytes
    table: GenerationTable


class SegmentWriter:
    """Commits the generations of one writer.

    `add` never waits: while the storage refuses (full, over quota, I/O error) rows stay in memory and `add` and
    `poll` try again when the back-off allows. `flush` waits. Rows are counted (`num_ok` ...) only when they are
    committed.

    `on_commit(name, table)` is called after each commit (for `Coverage.add_table` and the heartbeat).
    Raises ResumableError when the storage has refused for `policy.retry_s` or the memory for waiting rows is used up;
    RunDirectoryError when it refuses for a reason that waiting cannot cure (no permission, folder gone).
    """

    def __init__(
        self,
        run: RunDirectory,
        writer_id: str,
        policy: SegmentPolicy = SegmentPolicy(),
        *,
        on_commit: Callable[[str, GenerationTable], None] = lambda name, table: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._run = run
        self._writer_id = writer_id
        self._policy = policy
        self._on_commit = on_commit
        self._clock = clock
        self._sleep = sleep
        self._sequence = 0
        self._buffer: list[Generation] = []
        self._buffer_bytes = 0
        self._oldest_at = 0.0
        self._pending: list[_Pending] = []
        self._failing_since: float | None = None
        self._retry_at = float("-inf")
        self._backoff_s = policy.backoff_s
        self._last_error = ""
        self._sizes: dict[str, int] = {}
        self._compact_at = policy.max_segments
        self.num_ok = 0
        """(row, sample) committed as ok."""
        self.num_failed = 0
        """(row, sample) committed as failed."""
        self.num_partial = 0
        """(row, sample) committed as partial."""
        self.num_retries = 0
        """Commits that the storage refused."""
        self.num_compactions = 0

    @property
    def num_waiting(self) -> int:
        """Rows in memory, not committed."""
        return len(self._buffer) + sum(len(pending.table) for pending in self._pending)

    @property
    def num_committed(self) -> int:
        """Rows committed, partial ones included."""
        return self.num_ok + self.num_failed + self.num_partial

    @property
    def is_refused(self) -> bool:
        """Whether the storage refuses commits at the moment."""
        return self._failing_since is not None

    def add(self, generations: Sequence[Generation]) -> None:
        """Takes finished (or, when draining, partial) rows, and commits when a threshold is reached."""
        if generations and not self._buffer:
            self._oldest_at = self._clock()
        self._buffer.extend(generations)
        self._buffer_bytes += sum(
            _ROW_OVERHEAD_BYTES + len(g.text) + 4 * len(g.token_ids) + len(g.error) for g in generations
        )
        self.poll()

    def poll(self) -> None:
        """Commits what has waited long enough. To be called between steps."""
        self._cut(force=False)
        self._try_commits()
        waiting_bytes = self._buffer_bytes + sum(len(pending.image) for pending in self._pending)
        if self._failing_since is not None and waiting_bytes > self._policy.max_buffer_bytes:
            raise self._give_up(f"{format_bytes(waiting_bytes)} wait in memory")

    def flush(self) -> None:
        """Commits everything, waiting for the storage for at most `policy.retry_s` since it first refused."""
        self._cut(force=True)
        self._retry_at = float("-inf")
        while True:
            self._try_commits()
            if not self._pending:
                return
            self._sleep(max(0.0, self._retry_at - self._clock()))

    def close(self) -> None:
        """`flush`, then leaves as few segments behind as compaction allows."""
        self.flush()
        self._compact(minimum=8)

    def _cut(self, *, force: bool) -> None:
        while self._buffer:
            full = len(self._buffer) >= self._policy.max_rows or self._buffer_bytes >= self._policy.max_bytes
            old = self._clock() - self._oldest_at >= self._policy.max_age_s
            if not (full or old or force):
                return
            taken = self._buffer[: self._policy.max_rows]
            del self._buffer[: self._policy.max_rows]
            if not self._buffer:
                self._buffer_bytes = 0
            else:
                self._buffer_bytes -= min(self._buffer_bytes, self._policy.max_bytes)
            table = GenerationTable.from_generations(taken).sorted()
            self._pending.append(_Pending(self._next_name(), encode_table(table, self._run.uuid), table))

    def _next_name(self) -> str:
        self._sequence += 1
        return segment_name(self._writer_id, self._sequence - 1)

    def _try_commits(self) -> None:
        while self._pending and self._clock() >= self._retry_at:
            pending = self._pending[0]
            try:
                commit_bytes(self._run.segments, pending.name, pending.image)
            except OSError as error:
                self._refused(error)
                return
            del self._pending[0]
            self._failing_since = None
            self._retry_at = float("-inf")
            self._backoff_s = self._policy.backoff_s
            self._count(pending)
            if len(self._sizes) > self._compact_at:
                self._compact(minimum=2)

    def _count(self, pending: _Pending) -> None:
        self._sizes[pending.name] = len(pending.image)
        status = pending.table.status
        self.num_ok += int((status == Status.OK).sum())
        self.num_failed += int((status == Status.FAILED).sum())
        self.num_partial += int((status == Status.PARTIAL).sum())
        self._on_commit(pending.name, pending.table)

    def _refused(self, error: OSError) -> None:
        if not is_transient(error):
            raise unusable(self._run.path, error) from error
        now = self._clock()
        self.num_retries += 1
        self._last_error = error.strerror or str(error)
        if self._failing_since is None:
            self._failing_since = now
        if now - self._failing_since >= self._policy.retry_s:
            raise self._give_up(f"refused for {now - self._failing_since:.0f} s") from error
        remaining = self._policy.retry_s - (now - self._failing_since)
        self._retry_at = now + min(self._backoff_s, remaining)
        self._backoff_s = min(30.0, 2 * self._backoff_s)

    def _give_up(self, why: str) -> ResumableError:
        return ResumableError(
            f"{self.num_waiting} rows cannot be written to {self._run.segments}: {self._last_error}",
            found=f"{why}; {self.num_committed} rows of this life are committed",
            fix="free space or quota and start the same job again; it goes on from what is committed",
        )

    # Compaction -----------------------------------------------------------------------------------------------------

    def _compact(self, minimum: int) -> None:
        """Merges this writer's small segments. The compacted one is committed before the old ones are unlinked: a
        reader may see both, and drops the duplicates. Storage trouble puts it off; rows are safe where they are.
        """
        small = [name for name, size in self._sizes.items() if size < self._policy.compact_bytes // 2]
        group: list[str] = []
        group_bytes = 0
        try:
            for name in [*small, None]:
                if group and (name is None or group_bytes + self._sizes[name] > self._policy.compact_bytes):
                    if len(group) >= minimum:
                        self._compact_group(group)
                    group, group_bytes = [], 0
                if name is not None:
                    group.append(name)
                    group_bytes += self._sizes[name]
        except OSError as error:
            if not is_transient(error):
                raise unusable(self._run.path, error) from error
        # Large segments and refused ones count on, so that a compaction is not tried at every commit.
        self._compact_at = len(self._sizes) + self._policy.max_segments

    def _compact_group(self, names: list[str]) -> None:
        tables = []
        read = []
        for name in names:
            try:
                with GenerationFile(self._run.segments / name) as file:
                    tables.append(file.table())
                read.append(name)
            except (DataError, FileNotFoundError):
                # Damaged or taken away since: left to the readers, who mark it and run its rows again.
                del self._sizes[name]
        if len(read) < 2:
            return
        table = GenerationTable.concatenate(tables).deduplicated()
        compacted = self._next_name()
        image = encode_table(table, self._run.uuid)
        commit_bytes(self._run.segments, compacted, image)
        self._sizes[compacted] = len(image)
        self.num_compactions += 1
        for name in read:
            remove_quietly(Path(self._run.segments / name))
            del self._sizes[name]
        fsync_folder(self._run.segments)
