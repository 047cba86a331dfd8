"""Which (row, sample) are done: a bitmap built from the committed segments, kept up to date as new ones appear."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import time
from collections.abc import Callable, Iterator

import numpy as np

from hpcinfer.data.ledger.commit import create_new
from hpcinfer.data.generation_table import GenerationTable
from hpcinfer.data.generations import GenerationFile
from hpcinfer.data.ledger.rounds import WriterRounds
from hpcinfer.data.ledger.run_directory import RunDirectory, storage_errors
from hpcinfer.data.ledger.selection import RowSelection
from hpcinfer.errors import DataError, ResumableError, RunDirectoryError
from hpcinfer.request import Generation, Status

BAD_SUFFIX = ".bad"
BAD_AFTER_S = 60.0
# Errors that say that one file is lost, not that the reader lacks something.
_FILE_ERRNOS = frozenset((errno.EIO, errno.ESTALE, errno.ENODATA, errno.EREMOTEIO, errno.EUCLEAN, errno.EBADMSG))
_SEGMENT = re.compile(r"seg-([0-9a-f]{16})-(\d{6,})\.h5")


def segment_name(writer_id: str, sequence: int) -> str:
    """`seg-<writer>-<sequence>.h5`."""
    return f"seg-{writer_id}-{sequence:06d}.h5"


def segment_order(name: str) -> tuple[str, int]:
    """(writer, sequence) of a segment's name: the order in which duplicates are preferred."""
    match = _SEGMENT.fullmatch(name)
    if match is None:
        raise DataError(f"not the name of a segment: {name}")
    return match.group(1), int(match.group(2))


def list_segments(run: RunDirectory) -> tuple[list[str], set[str]]:
    """(names of segments in the order of preference, names among them that carry a `.bad` marker). Raises OSError."""
    listed = os.listdir(run.segments)
    names = sorted((name for name in listed if _SEGMENT.fullmatch(name)), key=segment_order)
    bad = {name.removesuffix(BAD_SUFFIX) for name in listed if name.endswith(BAD_SUFFIX)}
    return names, bad


def mark_bad(run: RunDirectory, name: str, reason: str) -> None:
    """Puts a `.bad` marker beside a segment, with the reason in it; the segment itself is left where it is. Raises
    OSError.
    """
    try:
        descriptor = create_new(run.segments / (name + BAD_SUFFIX))
    except FileExistsError:
        return
    try:
        os.write(descriptor, reason.encode("utf-8", "replace")[:4000] + b"\n")
    finally:
        os.close(descriptor)


class BadSegments:
    """Decides when a segment that cannot be read is bad: after it failed for `after_s`, for a parallel file system
    may show a file before its content. Troubles of the reader itself (too few file handles, no permission) never
    count. `say` is told, in words, of each that is waited for.
    """

    def __init__(
        self, run: RunDirectory, *, after_s: float = BAD_AFTER_S, clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        self._run = run
        self._after_s = after_s
        self._clock = clock
        self._say = say
        self._first_failure: dict[str, float] = {}
        self.num_marked = 0
        """Markers set by this reader."""

    @property
    def waiting(self) -> tuple[str, ...]:
        """Names of segments that failed and are not judged yet."""
        return tuple(self._first_failure)

    def failed(self, name: str, error: DataError | OSError) -> bool:
        """Notes a failure to read a segment. Returns whether it is marked bad now.

        Raises `error` where the reader or its storage is at fault, not the file; OSError where the marker cannot be
        written.
        """
        if isinstance(error, OSError) and error.errno not in _FILE_ERRNOS:
            raise error
        now = self._clock()
        if name not in self._first_failure:
            self._say(f"{name} cannot be read: it is tried for {self._after_s:.0f} s, and its rows are missing after that")
        if now - self._first_failure.setdefault(name, now) < self._after_s:
            return False
        mark_bad(self._run, name, str(error))
        self.num_marked += 1
        del self._first_failure[name]
        return True

    def read(self, name: str) -> None:
        """Notes that a segment could be read, or is gone."""
        self._first_failure.pop(name, None)


@dataclasses.dataclass(frozen=True, slots=True)
class _Partial:
    num_tokens: int
    segment: str
    index: int


class Coverage:
    """The bitmap of done (row, sample), the rows missing in each claim, and where the partial rows are.

    A row is done when it is committed as ok, or as failed in this round (`rounds`). Memory: a bit a (row, sample), 8
    bytes a claim, and the partial rows.
    """

    def __init__(
        self,
        run: RunDirectory,
        num_rows: int,
        *,
        bad_segments: BadSegments | None = None,
        selection: RowSelection | None = None,
        retry_round: int | None = None,
    ) -> None:
        """`num_rows`: rows of the input now; rows beyond it (of a writer that sees a longer input) are passed over.
        `selection`: the rows that are wanted, by default all; others count as done. `retry_round`: failed rows of
        earlier rounds count as missing; by default the newest round that there is now. Raises RunDirectoryError, ResumableError
        where that cannot be read.
        """
        self._run = run
        self.num_rows = num_rows
        self.num_samples = run.num_samples
        self.claim_size = run.claim_size
        self.num_claims = -(-num_rows // run.claim_size)
        self.bad_segments = bad_segments or BadSegments(run)
        self._selection = selection or RowSelection(0, num_rows)
        self.rounds = WriterRounds(run)
        self.retry_round = self.rounds.newest() if retry_round is None else retry_round
        """The round in which failed rows are done."""
        self._reset()

    def _reset(self) -> None:
        self._bits = self._selection.unselected_bits(self.num_rows, self.num_samples)
        self._missing = self._selection.rows_of_claims(self.num_claims, self.claim_size) * self.num_samples
        self.num_failed = 0
        """(row, sample) first seen as failed, in this round."""
        self._partials: dict[int, _Partial] = {}
        self._known: set[str] = set()

    @property
    def num_keys(self) -> int:
        """(row, sample) pairs of the whole input."""
        return self.num_rows * self.num_samples

    @property
    def num_wanted(self) -> int:
        """(row, sample) pairs of the selected rows."""
        return self._selection.num_rows * self.num_samples

    @property
    def num_missing(self) -> int:
        """(row, sample) pairs not done."""
        return int(self._missing.sum())

    @property
    def num_partial(self) -> int:
        """(row, sample) pairs not done, but begun."""
        return len(self._partials)

    @property
    def is_full(self) -> bool:
        """Whether everything is done."""
        return self.num_missing == 0

    def missing_in_claim(self, number: int) -> int:
        """(row, sample) pairs of a claim not done."""
        return int(self._missing[number])

    def incomplete_claims(self) -> np.ndarray:
        """int64: numbers of the claims in which something is missing."""
        return np.flatnonzero(self._missing)

    def is_done(self, row: int, sample: int) -> bool:
        """Whether (row, sample) is committed as ok or failed, or not wanted."""
        key = row * self.num_samples + sample
        return bool(self._bits[key >> 3] >> (key & 7) & 1)

    def add(
        self, segment: str, rows: np.ndarray, samples: np.ndarray, statuses: np.ndarray, lengths: np.ndarray
    ) -> None:
        """Counts the rows of a committed segment; columns in the order of the file. Twice does no harm."""
        self._known.add(segment)
        inside = np.flatnonzero((rows < self.num_rows) & (samples < self.num_samples))
        keys = rows[inside].astype(np.int64) * self.num_samples + samples[inside].astype(np.int64)
        statuses = statuses[inside]
        is_final = not self.retry_round or self.rounds.of(segment_order(segment)[0]) >= self.retry_round
        done = statuses != Status.PARTIAL if is_final else statuses == Status.OK
        candidates, first = np.unique(keys[done], return_index=True)
        new = (self._bits[candidates >> 3] >> (candidates & 7).astype(np.uint8)) & 1 == 0
        fresh = candidates[new]
        np.bitwise_or.at(self._bits, fresh >> 3, np.left_shift(1, fresh & 7).astype(np.uint8))
        np.subtract.at(self._missing, fresh // (self.claim_size * self.num_samples), 1)
        self.num_failed += int(np.count_nonzero(statuses[done][first][new] == Status.FAILED))
        if self._partials:
            for key in fresh.tolist():
                self._partials.pop(key, None)
        for position in np.flatnonzero(statuses == Status.PARTIAL).tolist():
            index = int(inside[position])
            self._add_partial(int(keys[position]), _Partial(int(lengths[index]), segment, index))

    def _add_partial(self, key: int, partial: _Partial) -> None:
        if self._bits[key >> 3] >> (key & 7) & 1:
            return
        before = self._partials.get(key)
        # The longest wins: draws are keyed, so that a shorter one is its beginning.
        if before is None or partial.num_tokens > before.num_tokens:
            self._partials[key] = partial

    def add_table(self, segment: str, table: GenerationTable) -> None:
        """`add` of a table that was committed as `segment` (which stores it sorted)."""
        table = table.sorted()
        self.add(segment, table.row, table.sample, table.status, table.n_output_tokens)

    def refresh(self) -> None:
        """Reads the segments that are new since the last call; starts anew where one was found to be bad. Raises
        RunDirectoryError, ResumableError.
        """
        with storage_errors(self._run.path):
            self._refresh()

    def _refresh(self) -> None:
        names, bad = list_segments(self._run)
        if bad & self._known:
            self._reset()
        listed = set(names)
        vanished = self._known - listed
        if vanished:
            # Compacted away: the rows are in a new segment of the same writer, which is listed by now or next time.
            self._partials = {key: p for key, p in self._partials.items() if p.segment not in vanished}
            self._known -= vanished
        for name in names:
            if name not in self._known and name not in bad:
                self._read(name)

    def _read(self, name: str) -> None:
        try:
            with GenerationFile(self._run.segments / name) as file:
                if file.run_uuid != self._run.uuid:
                    raise DataError(
                        f"{name} belongs to another run", found=f"{file.run_uuid}, this is {self._run.uuid}"
                    )
                columns = [file.rows(), file.samples(), file.statuses(), file.column("n_output_tokens")]
        except FileNotFoundError:
            self.bad_segments.read(name)
            return
        except (DataError, OSError) as error:
            self.bad_segments.failed(name, error)
            return
        self.bad_segments.read(name)
        self.add(name, *columns)

    def remaining(self, start: int, stop: int) -> Iterator[tuple[int, int, Generation | None]]:
        """(row, sample, its partial row or None) of what is missing in rows [start, stop), in order.

        The bitmap is read as the iteration goes, a partial row when it comes up.
        """
        for row in range(start, min(stop, self.num_rows)):
            for sample in range(self.num_samples):
                if not self.is_done(row, sample):
                    yield row, sample, self._partial_row(row * self.num_samples + sample)

    def _partial_row(self, key: int) -> Generation | None:
        for _ in range(3):
            partial = self._partials.get(key)
            if partial is None:
                return None
            try:
                with GenerationFile(self._run.segments / partial.segment) as file:
                    return next(file.table(partial.index, partial.index + 1).generations())
            except FileNotFoundError:
                with contextlib.suppress(RunDirectoryError, ResumableError):
                    self.refresh()
            except (DataError, OSError):
                # Lost tokens are drawn again; the segment is judged when it is merged.
                return None
        return None
