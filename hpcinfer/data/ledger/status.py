"""How far a run is, read from its files alone: works on a login node while jobs run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from hpcinfer.data.ledger.coverage import Coverage, list_segments
from hpcinfer.data.ledger.liveness import STALE_AFTER_S, Verdict, is_gone_from_this_machine
from hpcinfer.data.ledger.run_directory import RunDirectory, open_existing, unusable
from hpcinfer.data.ledger.writers import WriterIdentity, read_heartbeat, read_identity, writer_ids

EXACT_SEGMENTS = 500


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WriterStatus:
    """One life of a replica."""

    id: str
    identity: WriterIdentity
    state: str
    """Its own word: starting, loading, running, idle, draining, merging, left; "" before its first heartbeat."""
    verdict: Verdict
    """What can be told in one look: silent goes by the clock of the writer's node, and is a hint only."""
    beat_age_s: float
    """Seconds since the last heartbeat, across the two nodes' clocks; inf before the first."""
    num_ok: int
    num_failed: int
    num_partial: int
    num_claimed: int
    """(row, sample) pairs that it has claimed in its life."""
    output_tokens: int
    rows_per_s: float
    output_tokens_per_s: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """Counts are (row, sample) pairs."""

    path: Path
    uuid: str
    num_rows: int
    num_samples: int
    num_total: int
    num_done: int
    """Committed as ok."""
    num_failed: int
    num_partial: int
    """Begun, committed as partial, not done."""
    num_claimed: int
    """Held by writers that are not known to be gone, and not done yet."""
    num_left: int
    """Neither done nor claimed."""
    exact: bool
    """True when the segments were read; False when the counts are those of the heartbeats (many segments): rows done
    twice count twice, rows of a killed writer's last seconds are missing.
    """
    complete: bool
    output: Path | None
    """generations.h5, once it is there."""
    num_segments: int
    num_bad_segments: int
    rows_per_s: float
    """Sum over live writers."""
    output_tokens_per_s: float
    writers: tuple[WriterStatus, ...]

    @property
    def eta_s(self) -> float:
        """Seconds to go at the present rate; inf when nothing runs; 0 when complete."""
        to_do = self.num_total - self.num_done - self.num_failed
        if not to_do:
            return 0.0
        return to_do / self.rows_per_s if self.rows_per_s > 0 else float("inf")


def read_status(
    path: str | Path | RunDirectory,
    *,
    exact: bool | None = None,
    stale_after_s: float = STALE_AFTER_S,
    wall_clock: Callable[[], float] = time.time,
) -> RunStatus:
    """The status of a run directory. Without `exact` up to 500 segments are read; beyond that the heartbeats' counts
    are used.

    Reads only. Raises RunDirectoryError where it is not a run directory.
    """
    run = path if isinstance(path, RunDirectory) else open_existing(path)
    try:
        writers = tuple(_writer_status(run, writer_id, stale_after_s, wall_clock()) for writer_id in writer_ids(run))
        names, bad = list_segments(run)
        done_marker = run.read_done()
        num_rows = max([run.num_rows, *(w.identity.num_rows for w in writers), (done_marker or {}).get("num_rows", 0)])
        complete = run.is_complete(num_rows)
        total = num_rows * run.num_samples
        if complete:
            num_ok, num_failed, num_partial, exact = done_marker["ok"], done_marker["failed"], 0, True
        elif exact or (exact is None and len(names) <= EXACT_SEGMENTS):
            coverage = Coverage(run, num_rows)
            coverage.refresh()
            num_failed, num_partial, exact = coverage.num_failed, coverage.num_partial, True
            num_ok = total - coverage.num_missing - num_failed
        else:
            num_ok = min(total, sum(w.num_ok for w in writers))
            num_failed = min(total - num_ok, sum(w.num_failed for w in writers))
            num_partial = min(total - num_ok - num_failed, sum(w.num_partial for w in writers))
            exact = False
    except OSError as error:
        raise unusable(run.path, error) from error
    active = [w for w in writers if w.verdict in (Verdict.LIVE, Verdict.SILENT)]
    to_do = total - num_ok - num_failed
    claimed = min(to_do, sum(max(0, w.num_claimed - w.num_ok - w.num_failed) for w in active))
    live = [w for w in active if w.verdict is Verdict.LIVE]
    return RunStatus(
        path=run.path,
        uuid=run.uuid,
        num_rows=num_rows,
        num_samples=run.num_samples,
        num_total=total,
        num_done=num_ok,
        num_failed=num_failed,
        num_partial=num_partial,
        num_claimed=claimed,
        num_left=to_do - claimed,
        exact=exact,
        complete=complete,
        output=run.generations if run.generations.exists() else None,
        num_segments=len(names),
        num_bad_segments=len(bad),
        rows_per_s=sum(w.rows_per_s for w in live),
        output_tokens_per_s=sum(w.output_tokens_per_s for w in live),
        writers=writers,
    )


def _writer_status(run: RunDirectory, writer_id: str, stale_after_s: float, now: float) -> WriterStatus:
    identity = read_identity(run, writer_id) or WriterIdentity()
    beat = read_heartbeat(run, writer_id)
    age = max(0.0, now - beat["at"]) if "at" in beat else float("inf")
    state = beat.get("state", "")
    if state == "left":
        verdict = Verdict.LEFT
    elif is_gone_from_this_machine(identity):
        verdict = Verdict.DEAD
    else:
        verdict = Verdict.SILENT if age > stale_after_s else Verdict.LIVE
    return WriterStatus(
        id=writer_id,
        identity=identity,
        state=state,
        verdict=verdict,
        beat_age_s=age,
        num_ok=int(beat.get("rows_ok", 0)),
        num_failed=int(beat.get("rows_failed", 0)),
        num_partial=int(beat.get("rows_partial", 0)),
        num_claimed=int(beat.get("rows_claimed", 0)),
        output_tokens=int(beat.get("output_tokens", 0)),
        rows_per_s=float(beat.get("rows_per_s", 0.0)),
        output_tokens_per_s=float(beat.get("output_tokens_per_s", 0.0)),
    )
