"""The merge: all segments of a run into one file sorted by (row, sample), each once.

Segments are sorted inside. A first pass reads their small columns (keys, offsets) and cuts the rows into ranges of
about `RANGE_BYTES`; a second pass loads one range after the other from all segments that touch it, drops duplicates and
appends. Memory holds one range, whatever the size of the run.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np

from hpcinfer.data import generations as format_v1
from hpcinfer.data.ledger.commit import (
    TEMPORARY_PREFIX,
    claim_name,
    fsync_folder,
    read_owner,
    remove_quietly,
    temporary_path,
)
from hpcinfer.data.ledger.coverage import BadSegments, Coverage, list_segments, segment_order
from hpcinfer.data.generation_table import GenerationTable
from hpcinfer.data.generations import GenerationFile
from hpcinfer.data.ledger.liveness import Liveness, Verdict
from hpcinfer.data.ledger.merged_file import MergedColumns, Sink
from hpcinfer.data.ledger.rounds import WriterRounds
from hpcinfer.data.ledger.run_directory import RunDirectory, storage_errors, unusable
from hpcinfer.data.ledger.writers import identity_path, writer_ids
from hpcinfer.errors import DataError, ResumableError
from hpcinfer.request import Status

RANGE_BYTES = 32 * 2**20
_BINS = 16384
_ROW_BYTES = 64


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MergeResult:
    """What a merge wrote."""

    path: Path
    num_ok: int
    num_failed: int
    num_partial: int
    num_keys: int
    """(row, sample) pairs of the run."""
    num_duplicates: int
    """Rows dropped because another one of the same key was better."""
    num_segments: int
    num_bad_segments: int
    prompt_tokens: int
    output_tokens: int
    complete: bool

    @property
    def num_missing(self) -> int:
        """(row, sample) pairs without a row of any kind."""
        return self.num_keys - self.num_ok - self.num_failed - self.num_partial


class IncompleteRunError(ResumableError):
    """A merge was asked of a run in which rows are missing."""


class _SegmentsChanged(Exception):
    """A segment vanished (compacted) or was found bad: the plan is made again."""


def merge_run(
    run: RunDirectory,
    num_rows: int,
    destination: Path | None = None,
    *,
    allow_partial: bool = False,
    bad_segments: BadSegments | None = None,
    progress: Callable[[], None] = lambda: None,
    sleep: Callable[[float], None] = time.sleep,
    range_bytes: int = RANGE_BYTES,
    owner: str = "manual",
) -> MergeResult:
    """Merges the segments into `destination` (default: generations.h5 of the run, and then the marker of completion).

    The file is written under a temporary name, made durable, then renamed. Its attribute `complete` is 1 only when
    every (row, sample) of `num_rows` rows is there as ok or failed; otherwise the merge is refused with the counts,
    unless `allow_partial`. `progress` is called every now and then (a heartbeat); `owner`, the writer id, goes into
    the temporary name. Two mergers at once do no harm.

    Raises IncompleteRunError (exit code 3), ResumableError (disk full), RunDirectoryError, DataError.
    """
    final = run.generations if destination is None else Path(destination)
    bad_segments = bad_segments or BadSegments(run)
    if destination is not None and final.exists():
        raise DataError(f"{final} exists", fix="remove it, or give another name")
    if not final.parent.is_dir():
        raise DataError(f"cannot write {final}", found=f"no folder {final.parent}", fix="make the folder, or give another name")
    try:
        while True:
            try:
                plan = _Plan(run, num_rows, bad_segments, progress, range_bytes)
                if not plan.coverage.is_full and not allow_partial:
                    raise _incomplete(run, plan)
                result = _write(run, plan, final, owner, progress)
                break
            except _SegmentsChanged:
                _settle(run, bad_segments, progress, sleep)
        if result.complete and destination is None:
            run.write_done(
                {
                    "num_rows": num_rows,
                    "num_samples": run.num_samples,
                    "retry_round": plan.coverage.retry_round,
                    "ok": result.num_ok,
                    "failed": result.num_failed,
                    "prompt_tokens": result.prompt_tokens,
                    "output_tokens": result.output_tokens,
                    "num_bytes": final.stat().st_size,
                },
                owner,
            )
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResumableError(
                f"no space to write {final}: {error.strerror}",
                found="all rows are safe in the segments",
                fix=f"free space, then: hpcinfer merge {run.path}",
            ) from error
        raise unusable(run.path if destination is None else final.parent, error) from error
    return result


def merge_trial(run: RunDirectory, num_rows: int) -> None:
    """Merges what is committed into `run.trial`, in the place of what an earlier trial left there. Raises as `merge_run`."""
    temporary = temporary_path(run.path, run.trial.name)
    try:
        merge_run(run, num_rows, temporary, allow_partial=True)
        with storage_errors(run.path):
            os.replace(temporary, run.trial)
            fsync_folder(run.path)
    finally:
        remove_quietly(temporary)


def _settle(run: RunDirectory, bad: BadSegments, progress: Callable[[], None], sleep: Callable[[float], None]) -> None:
    """Waits until every segment that failed can be read whole, or is marked bad."""
    sleep(0.05)
    for name in bad.waiting:
        while name in bad.waiting:
            progress()
            try:
                with GenerationFile(run.segments / name) as file:
                    if file.run_uuid != run.uuid:
                        raise DataError(f"{name} belongs to another run", found=file.run_uuid)
                    file.validate()
                bad.read(name)
            except FileNotFoundError:
                bad.read(name)
            except (DataError, OSError) as error:
                if not bad.failed(name, error):
                    sleep(1.0)


def claim_merge(run: RunDirectory, writer_id: str, liveness: Liveness) -> bool:
    """Whether this writer is to merge: true for one of all live writers. A merger that left, died or fell silent is
    replaced. Raises RunDirectoryError, ResumableError.
    """
    with storage_errors(run.path):
        # After EEXIST the folder is read again before deciding.
        while True:
            taken = [
                int(name.removeprefix("merge."))
                for name in os.listdir(run.claims)
                if name.startswith("merge.") and name.removeprefix("merge.").isdecimal()
            ]
            generation = max(taken, default=-1)
            if generation >= 0:
                owner = read_owner(run.claims, f"merge.{generation}") or ""
                if owner == writer_id:
                    return True
                liveness.refresh()
                verdict = liveness.verdict(owner) if owner else liveness.unowned_verdict(f"merge.{generation}")
                if verdict is Verdict.LIVE:
                    return False
            if claim_name(run.claims, f"merge.{generation + 1}", writer_id, identity_path(run, writer_id)):
                return True


def remove_leftovers(run: RunDirectory, liveness: Liveness) -> int:
    """Removes temporary files of writers that left or died (killed in mid commit or merge). Returns how many.
    Nothing of a live writer is touched. Raises RunDirectoryError, ResumableError.
    """
    removed = 0
    with storage_errors(run.path):
        ids = writer_ids(run)
        for folder in (run.segments, run.writers, run.path):
            for name in (name for name in os.listdir(folder) if name.startswith(TEMPORARY_PREFIX)):
                owners = [writer_id for writer_id in ids if writer_id in name]
                if owners and all(liveness.verdict(writer_id) in (Verdict.LEFT, Verdict.DEAD) for writer_id in owners):
                    (folder / name).unlink(missing_ok=True)
                    removed += 1
    return removed


# The plan -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class _Segment:
    """Where the rows of one segment fall: the rows from positions[i] on belong to bins[i]."""

    name: str
    bins: np.ndarray
    positions: np.ndarray
    num_rows: int


class _Plan:
    """Which segments, and the ranges of rows to load at once."""

    def __init__(
        self, run: RunDirectory, num_rows: int, bad: BadSegments, progress: Callable[[], None], range_bytes: int
    ) -> None:
        self._run = run
        self._bad = bad
        self.num_rows = num_rows
        self.bin_rows = max(1, -(-num_rows // _BINS))
        self.segments: list[_Segment] = []
        self.optional: set[str] = set()
        """Optional columns of any segment."""
        self.coverage = Coverage(run, num_rows, bad_segments=bad)
        """What the segments hold; its own reading is not used."""
        weights = np.zeros(-(-num_rows // self.bin_rows) + 1, np.int64)
        names, marked = list_segments(run)
        rounds = WriterRounds(run)
        self.num_bad = len(marked)
        # Of a row that failed in several rounds the last error counts.
        names.sort(key=lambda name: -rounds.of(segment_order(name)[0]))
        for index, name in enumerate(name for name in names if name not in marked):
            self._add(name, weights)
            if index % 16 == 0:
                progress()
        filled = np.cumsum(weights)
        # A range ends where the next multiple of range_bytes falls; a bin that is larger by itself is a range by
        # itself.
        self.edges = np.concatenate(([0], np.flatnonzero(np.diff(filled // range_bytes)) + 1, [len(weights)]))

    def _add(self, name: str, weights: np.ndarray) -> None:
        with _segment(self._run, name, self._bad) as file:
            rows = file.rows()
            self.optional.update(file.optional)
            self.coverage.add(name, rows, file.samples(), file.statuses(), file.column("n_output_tokens"))
            if np.any(rows[1:] < rows[:-1]):
                raise DataError(f"{name} is not sorted by row")
            keep = int(np.searchsorted(rows, self.num_rows))
            if not keep:
                return
            bins = (rows[:keep] // self.bin_rows).astype(np.int64)
            sizes = np.full(keep, _ROW_BYTES, np.int64)
            for column, dtype in file.ragged.items():
                sizes += np.diff(file.offsets(column)[: keep + 1]) * dtype.itemsize
            np.add.at(weights, bins, sizes)
            firsts = np.concatenate(([0], np.flatnonzero(np.diff(bins)) + 1))
            self.segments.append(_Segment(name, bins[firsts].astype(np.int32), firsts.astype(np.int32), keep))

    def tables(self, progress: Callable[[], None]) -> Iterator[GenerationTable]:
        """The rows, range after range; inside a range segment after segment in the order of preference."""
        for first_bin, last_bin in zip(self.edges[:-1].tolist(), self.edges[1:].tolist(), strict=True):
            parts = []
            for segment in self.segments:
                low, high = np.searchsorted(segment.bins, (first_bin, last_bin))
                if low == high:
                    continue
                start = int(segment.positions[low])
                stop = int(segment.positions[high]) if high < len(segment.positions) else segment.num_rows
                with _segment(self._run, segment.name, self._bad) as file:
                    parts.append(file.table(start, stop))
                if len(parts) % 16 == 0:
                    progress()
            if parts:
                yield GenerationTable.concatenate(parts)


class _segment:  # noqa: N801 (used as a verb)
    """Opens a segment; whatever is wrong with it becomes `_SegmentsChanged`, once the segment is judged."""

    def __init__(self, run: RunDirectory, name: str, bad: BadSegments) -> None:
        self._run = run
        self._name = name
        self._bad = bad
        self._file: GenerationFile | None = None

    def __enter__(self) -> GenerationFile:
        try:
            self._file = GenerationFile(self._run.segments / self._name)
            if self._file.run_uuid != self._run.uuid:
                raise DataError(f"{self._name} belongs to another run", found=self._file.run_uuid)
        except (DataError, OSError) as error:
            self._judge(error)
        return self._file

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._file.close()
        if isinstance(error, (DataError, OSError)):
            self._judge(error)

    def _judge(self, error: DataError | OSError) -> None:
        if self._file is not None:
            self._file.close()
        if not isinstance(error, FileNotFoundError):
            self._bad.failed(self._name, error)
        else:
            self._bad.read(self._name)
        raise _SegmentsChanged from error


def _write(run: RunDirectory, plan: _Plan, final: Path, owner: str, progress: Callable[[], None]) -> MergeResult:
    num_keys = plan.coverage.num_keys
    counts = np.zeros(3, np.int64)
    num_read = prompt_tokens = output_tokens = 0
    temporary = temporary_path(final.parent, f"{owner}-{final.name}")
    sink = Sink(temporary)
    try:
        with h5py.File(sink, "w", libver=format_v1.LIBVER) as file:
            output = MergedColumns(file, plan.optional)
            for table in plan.tables(progress):
                num_read += len(table)
                table = table.deduplicated()
                table = table.take(np.flatnonzero(table.sample < run.num_samples))
                output.append(table)
                counts += np.bincount(table.status, minlength=3)
                prompt_tokens += int(table.n_prompt_tokens.sum(dtype=np.int64))
                output_tokens += int(table.n_output_tokens.sum(dtype=np.int64))
                sink.check()
                progress()
            # Failed rows of earlier rounds are there, but not done.
            complete = plan.coverage.is_full
            format_v1.write_root_attributes(file, run.uuid, complete)
        sink.check()
        result = MergeResult(
            path=final,
            num_ok=int(counts[Status.OK]),
            num_failed=int(counts[Status.FAILED]),
            num_partial=int(counts[Status.PARTIAL]),
            num_keys=num_keys,
            num_duplicates=num_read - int(counts.sum()),
            num_segments=len(plan.segments),
            num_bad_segments=plan.num_bad,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            complete=complete,
        )
        if complete and int(counts[Status.OK] + counts[Status.FAILED]) != num_keys:
            raise DataError(f"the merge of {run.path} does not match its segments", found=f"{result}")
        sink.finish()
        os.rename(temporary, final)
        fsync_folder(final.parent)
    finally:
        sink.abandon()
        remove_quietly(temporary)  # Nothing to remove once it is renamed.
    return result


def _incomplete(run: RunDirectory, plan: _Plan) -> IncompleteRunError:
    coverage = plan.coverage
    num_ok = coverage.num_keys - coverage.num_missing - coverage.num_failed
    bad = f", {plan.num_bad} damaged segments left out" if plan.num_bad else ""
    return IncompleteRunError(
        f"the run in {run.path} is not complete",
        found=f"{num_ok} ok, {coverage.num_failed} failed, {coverage.num_partial} partial, "
        f"{coverage.num_missing - coverage.num_partial} missing of {coverage.num_keys} (row, sample) pairs{bad}",
        fix="run the same job again to finish it, or merge what is there: hpcinfer merge RUN_DIR OUT.h5 --partial",
    )
