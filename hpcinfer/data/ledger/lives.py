"""Lives of a Slurm job in a run: each start of the job is one, told from the others by Slurm's count of restarts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hpcinfer.data.ledger.coverage import list_segments, segment_order
from hpcinfer.data.ledger.run_directory import RunDirectory, storage_errors
from hpcinfer.data.ledger.writers import Leaving, read_heartbeat, read_identity, writer_ids
from hpcinfer.errors import LivesError

BARREN_LIVES = 2
"""So many lives in a row without anything committed, and the next one does not begin."""


@dataclasses.dataclass(slots=True)
class Life:
    """One start of a job, all its writers together."""

    restart_count: int
    """0 for the first."""
    writers: list[str] = dataclasses.field(default_factory=list)
    """Their ids."""
    has_committed: bool = False
    """Some row, a partial one perhaps, is in a segment of it."""
    had_rows: bool = False
    """Some writer of it ended otherwise than by finding nothing to do."""

    @property
    def is_barren(self) -> bool:
        """Rows were left, and none was committed. A life that merely waited for others is not meant."""
        return self.had_rows and not self.has_committed


def lives_of_job(run: RunDirectory, *, job: str, cluster: str = "") -> list[Life]:
    """The lives of a job that came as far as this run's directory, the first one first. Raises OSError.

    What a life has committed is told from the names of segments: they are there before any heartbeat says so.
    """
    committers = {segment_order(name)[0] for name in list_segments(run)[0]}
    lives: dict[int, Life] = {}
    for writer_id in writer_ids(run):
        identity = read_identity(run, writer_id)
        if identity is None or identity.role != "replica" or (identity.cluster, identity.job) != (cluster, job):
            continue
        life = lives.setdefault(identity.restart_count, Life(identity.restart_count))
        life.writers.append(writer_id)
        life.has_committed |= writer_id in committers
        life.had_rows |= not _had_nothing_to_do(read_heartbeat(run, writer_id))
    return [lives[count] for count in sorted(lives)]


def check_lives(
    run: RunDirectory, num_rows: int, *, job: str, cluster: str = "", restart_count: int, max_lives: int, retry_round: int = 0
) -> None:
    """Make sure that another life of a Slurm job makes sense.

    Args:
        num_rows: rows of the input now.
        job: Slurm's job id; "" outside Slurm, where every start is somebody's own wish.
        restart_count: of this life, for which nobody has registered yet.
        max_lives: `run.max_lives`.
        retry_round: of this life.

    Raises:
        LivesError: too many lives, or the last ones committed nothing although rows were left.
    """
    if not job or restart_count == 0:
        return
    with storage_errors(run.path):
        if run.is_complete(num_rows, retry_round):
            return
        if restart_count >= max_lives:
            raise LivesError(
                f"Slurm has started job {job} {restart_count + 1} times; run.max_lives allows {max_lives}",
                fix=f"see with `hpcinfer status {run.path}` how far it is; submit it again, or raise run.max_lives",
            )
        before = [life for life in lives_of_job(run, job=job, cluster=cluster) if life.restart_count < restart_count]
    last = before[-BARREN_LIVES:]
    if len(last) == BARREN_LIVES and all(life.is_barren for life in last):
        raise LivesError(
            f"the last {BARREN_LIVES} lives of job {job} committed nothing although rows were left: another one would not either",
            found=f"writers {', '.join(writer for life in last for writer in life.writers)}; logs {_logs(run, job)}",
            fix="look in these logs, and in the job's own output, for what ended them: too little time to load the model and "
            "commit the first rows (run.segment_s), too little memory, a node that fails; then submit it as a new job",
        )


def _had_nothing_to_do(beat: Mapping[str, Any]) -> bool:
    """Whether a writer's last heartbeat says that all rows left were held by others, or none were left."""
    return beat.get("state") in ("idle", "merging") or beat.get("reason") in (Leaving.DONE, Leaving.NO_ROWS)


def _logs(run: RunDirectory, job: str) -> str:
    """The newest logs of a job's first ranks."""
    found = sorted(run.logs.glob(f"*-job{job}-rank0.log"))[-BARREN_LIVES:]
    return " and ".join(map(str, found)) or f"in {run.logs}"
