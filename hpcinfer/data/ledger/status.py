"""How far a run is, read from its files alone: works on a login node while jobs run."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hpcinfer.data.ledger.coverage import Coverage, list_segments, segment_order
from hpcinfer.data.ledger.liveness import STALE_AFTER_S, Verdict, is_gone_from_this_machine
from hpcinfer.data.ledger.run_directory import RunDirectory, open_existing, storage_errors
from hpcinfer.data.ledger.stragglers import find_stragglers
from hpcinfer.data.ledger.writers import WriterIdentity, read_heartbeat, read_identity, writer_ids

EXACT_SEGMENTS = 500


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WriterStatus:
    """One life of a replica."""

    id: str
    identity: WriterIdentity
    state: str
    """Its own word: starting, loading, running, idle, draining, merging, left; "" before its first heartbeat."""
    reason: str
    """Why it left (`writers.Leaving`); "" while it has not."""
    verdict: Verdict
    """What can be told by looking: silent goes, at the first look, by the clock of the writer's node, and is a hint only."""
    beat_age_s: float
    """Seconds since the last heartbeat, at the first look across the two nodes' clocks; inf before the first one."""
    beat_interval_s: float
    """How often it means to beat; 0 where it does not say."""
    num_ok: int
    num_failed: int
    num_partial: int
    num_claimed: int
    """(row, sample) pairs that it has claimed in its life."""
    num_segments: int
    """Segments of it that are there: above zero where it has committed something."""
    output_tokens: int
    running_s: float
    """How long it has been generating."""
    rows_per_s: float
    """Rows that ended in the last minutes of its life (`rows_per_s_now`), a second."""
    output_tokens_per_s: float
    """Tokens generated in the last minutes, a second; those of rows in work count."""
    straggles: str = ""
    """Why it holds the others up (`stragglers`); "" where it does not."""

    @property
    def is_active(self) -> bool:
        """It may be at work."""
        return self.verdict in (Verdict.LIVE, Verdict.SILENT)


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
    retry_round: int
    """How often failed rows were given another try. Failed rows of an earlier round are among those left."""
    rows_per_s: float
    """Now: the last minutes of the live writers, added up."""
    output_tokens_per_s: float
    """Now, the same."""
    rows_per_s_overall: float
    """Rows done since the run was created, pauses between lives included, a second."""
    writers: tuple[WriterStatus, ...]

    @property
    def num_to_do(self) -> int:
        """Neither done nor failed."""
        return self.num_total - self.num_done - self.num_failed

    @property
    def eta_s(self) -> float:
        """Seconds to go at the present rate; inf when nothing runs; 0 when complete."""
        if not self.num_to_do:
            return 0.0
        return self.num_to_do / self.rows_per_s if self.rows_per_s > 0 else math.inf


class StatusReader:
    """Looks at a run again and again. From the second look on, heartbeats are judged by this reader's own clock.

    Args:
        run: the run directory.
        exact: read the segments; by default where there are up to 500, and beyond that the heartbeats' counts are used.
        stale_after_s: a heartbeat that stands still for so long is silent.
        wall_clock, clock: of this reader.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        exact: bool | None = None,
        stale_after_s: float = STALE_AFTER_S,
        wall_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._exact = exact
        self._stale_after_s = stale_after_s
        self._wall_clock = wall_clock
        self._clock = clock
        self._seen: dict[str, tuple[object, float, float]] = {}
        """Writer -> (last heartbeat, its age when it was first seen, when that was)."""
        self._looked_at = -math.inf

    def read(self) -> RunStatus:
        """One look. Reads only.

        Raises:
            RunDirectoryError, ResumableError: the files cannot be read.
        """
        with storage_errors(self._run.path):
            return self._read()

    def _read(self) -> RunStatus:
        run = self._run
        names, bad = list_segments(run)
        segments = collections.Counter(segment_order(name)[0] for name in names)
        writers = [self._writer(writer_id, segments[writer_id]) for writer_id in writer_ids(run)]
        self._looked_at = self._clock()
        writers = _without_earlier_lives(writers)
        done = run.read_done()
        num_rows = max([run.num_rows, *(w.identity.num_rows for w in writers), (done or {}).get("num_rows", 0)])
        retry_round = max((w.identity.retry_round for w in writers), default=0)
        complete = done is not None and run.is_completed_by(done, num_rows, retry_round)
        if not complete:
            reasons = find_stragglers([w for w in writers if w.is_active and w.identity.role == "replica"])
            writers = [dataclasses.replace(w, straggles=reasons.get(w.id, "")) for w in writers]
        total = num_rows * run.num_samples
        exact = complete or (self._exact if self._exact is not None else len(names) <= EXACT_SEGMENTS)
        if complete:
            num_ok, num_failed, num_partial = done["ok"], done["failed"], 0
        elif exact:
            coverage = Coverage(run, num_rows, retry_round=retry_round)
            coverage.refresh()
            num_failed, num_partial = coverage.num_failed, coverage.num_partial
            num_ok = total - coverage.num_missing - num_failed
        else:
            num_ok = min(total, sum(w.num_ok for w in writers))
            num_failed = min(total - num_ok, sum(w.num_failed for w in writers if w.identity.retry_round == retry_round))
            num_partial = min(total - num_ok - num_failed, sum(w.num_partial for w in writers))
        active = [w for w in writers if w.is_active]
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
            retry_round=retry_round,
            rows_per_s=sum(w.rows_per_s for w in live),
            output_tokens_per_s=sum(w.output_tokens_per_s for w in live),
            rows_per_s_overall=(num_ok + num_failed) / max(self._lasted_s(writers), 1e-9),
            writers=tuple(writers),
        )

    def _lasted_s(self, writers: Sequence[WriterStatus]) -> float:
        """From the creation of the run to now, or to the last sign of life."""
        created = datetime.datetime.fromisoformat(self._run.created).timestamp()
        now = self._wall_clock()
        ages = [0.0 if w.verdict is Verdict.LIVE else w.beat_age_s for w in writers]
        return max(1.0, now - created - min((age for age in ages if age < math.inf), default=0.0))

    def _writer(self, writer_id: str, num_segments: int) -> WriterStatus:
        identity = read_identity(self._run, writer_id) or WriterIdentity()
        beat = read_heartbeat(self._run, writer_id)
        age = self._age(writer_id, beat)
        if beat.get("state") == "left":
            verdict = Verdict.LEFT
        elif is_gone_from_this_machine(identity):
            verdict = Verdict.DEAD
        else:
            verdict = Verdict.SILENT if age > self._stale_after_s else Verdict.LIVE
        return WriterStatus(
            id=writer_id,
            identity=identity,
            state=beat.get("state", ""),
            reason=beat.get("reason", ""),
            verdict=verdict,
            beat_age_s=age,
            beat_interval_s=float(beat.get("interval_s", 0.0)),
            num_ok=int(beat.get("rows_ok", 0)),
            num_failed=int(beat.get("rows_failed", 0)),
            num_partial=int(beat.get("rows_partial", 0)),
            num_claimed=int(beat.get("rows_claimed", 0)),
            num_segments=num_segments,
            output_tokens=int(beat.get("output_tokens", 0)),
            running_s=float(beat.get("running_s", 0.0)),
            rows_per_s=float(beat.get("rows_per_s_now", 0.0)),
            output_tokens_per_s=float(beat.get("output_tokens_per_s_now", 0.0)),
        )

    def _age(self, writer_id: str, beat: dict) -> float:
        if "at" not in beat:
            return math.inf
        now, before = self._clock(), self._seen.get(writer_id)
        if before is None or before[0] != beat["at"]:
            # It came since the last look: however wrong the two clocks are, it is no older than that.
            age = max(0.0, self._wall_clock() - beat["at"])
            before = self._seen[writer_id] = (beat["at"], age if before is None else min(age, now - self._looked_at), now)
        return before[1] + now - before[2]


def _without_earlier_lives(writers: Sequence[WriterStatus]) -> list[WriterStatus]:
    """The writers, those dead whose job has a later life: Slurm has started it again (`liveness`)."""
    newest: dict[tuple[str, str], int] = {}
    for identity in (writer.identity for writer in writers if writer.identity.job):
        key = (identity.cluster, identity.job)
        newest[key] = max(newest.get(key, 0), identity.restart_count)

    def is_replaced(writer: WriterStatus) -> bool:
        identity = writer.identity
        return writer.is_active and identity.restart_count < newest.get((identity.cluster, identity.job), 0)

    return [dataclasses.replace(writer, verdict=Verdict.DEAD) if is_replaced(writer) else writer for writer in writers]


def read_status(
    path: str | Path | RunDirectory,
    *,
    exact: bool | None = None,
    stale_after_s: float = STALE_AFTER_S,
    wall_clock: Callable[[], float] = time.time,
) -> RunStatus:
    """The status of a run directory at one look; see `StatusReader`.

    Raises:
        RunDirectoryError: it is not a run directory, or cannot be read.
    """
    run = path if isinstance(path, RunDirectory) else open_existing(path)
    return StatusReader(run, exact=exact, stale_after_s=stale_after_s, wall_clock=wall_clock).read()
