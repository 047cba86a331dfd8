"""The segments of one writer on the disk: building, committing and compacting them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hpcinfer.data.generation_table import GenerationTable
from hpcinfer.data.generations import GenerationFile, encode_table
from hpcinfer.data.ledger.commit import commit_bytes, fsync_folder, is_transient, remove_quietly
from hpcinfer.data.ledger.coverage import segment_name
from hpcinfer.data.ledger.run_directory import RunDirectory
from hpcinfer.errors import DataError
from hpcinfer.request import Generation


@dataclasses.dataclass(slots=True)
class Segment:
    """Rows on their way to the disk."""

    rows: Sequence[Generation]
    num_bytes: int
    """About what the rows take in memory."""
    name: str = ""
    """Drawn, with what follows, at the first attempt to commit: the same name and bytes at every attempt."""
    table: GenerationTable | None = None
    image: bytes = b""


class SegmentStore:
    """Not to be used by two threads at once.

    Args:
        writer_id: in the name of every segment; nobody else uses it.
        max_segments: small segments kept before they are compacted.
        compact_bytes: size of a compacted segment; one of half this size is not compacted again.
    """

    def __init__(self, run: RunDirectory, writer_id: str, *, max_segments: int, compact_bytes: int) -> None:
        self._run = run
        self._writer_id = writer_id
        self._max_segments = max_segments
        self._compact_bytes = compact_bytes
        self._sequence = 0
        self._sizes: dict[str, int] = {}
        self._compact_at = max_segments
        self.num_compactions = 0

    def commit(self, segment: Segment) -> None:
        """When it returns the segment is on disk. Raises OSError, after which calling again with the same segment is
        right; RunDirectoryError where another file has its name.
        """
        if not segment.name:
            segment.table = GenerationTable.from_generations(segment.rows).sorted()
            segment.image = encode_table(segment.table, self._run.uuid)
            segment.name = self._next_name()
        commit_bytes(self._run.segments, segment.name, segment.image)
        self._sizes[segment.name] = len(segment.image)

    def _next_name(self) -> str:
        self._sequence += 1
        return segment_name(self._writer_id, self._sequence - 1)

    def compact_when_due(self) -> None:
        """`compact` when there are too many small segments. Raises OSError where waiting cannot help."""
        if len(self._sizes) > self._compact_at:
            self.compact(minimum=2)

    def compact(self, *, minimum: int) -> None:
        """Merges this writer's small segments, `minimum` or more of them at a time. The compacted one is committed
        before the old ones are unlinked: a reader may see both, and drops the duplicates. Storage trouble puts it off;
        rows are safe where they are. Raises OSError where waiting cannot help.
        """
        small = [name for name, size in self._sizes.items() if size < self._compact_bytes // 2]
        group: list[str] = []
        group_bytes = 0
        try:
            for name in [*small, None]:
                if group and (name is None or group_bytes + self._sizes[name] > self._compact_bytes):
                    if len(group) >= minimum:
                        self._compact_group(group)
                    group, group_bytes = [], 0
                if name is not None:
                    group.append(name)
                    group_bytes += self._sizes[name]
        except OSError as error:
            if not is_transient(error):
                raise
        # Large segments and refused ones count on, so that a compaction is not tried at every commit.
        self._compact_at = len(self._sizes) + self._max_segments

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
            remove_quietly(self._run.segments / name)
            del self._sizes[name]
        fsync_folder(self._run.segments)
