"""Rounds of a run: how often its failed rows were given another try.

Every writer belongs to a round, which its identity says for good. A failed row counts as done only when a writer of the newest
round, which is the highest that any writer has, committed it; ok rows count in whichever round they were made. So a round begins when
its first writer registers; nothing that is there is changed for it.
"""

from __future__ import annotations

from collections.abc import Mapping

from hpcinfer.data.ledger.run_directory import RunDirectory, storage_errors
from hpcinfer.data.ledger.writers import WriterIdentity, read_identity, writer_ids
from hpcinfer.errors import RunDirectoryError

NO_TRUNCATION = "error"


class WriterRounds:
    """The round of each writer, read once."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._known: dict[str, int] = {}

    def of(self, writer_id: str) -> int:
        """The round of a writer; 0 where nothing says it. Raises RunDirectoryError, ResumableError."""
        known = self._known.get(writer_id)
        if known is None:
            with storage_errors(self._run.path):
                identity = read_identity(self._run, writer_id)
            known = 0 if identity is None else identity.retry_round
            if identity is not None:  # a file that is not whole yet is read again
                self._known[writer_id] = known
        return known

    def newest(self) -> int:
        """The highest round of any writer that is there now. Raises RunDirectoryError, ResumableError."""
        with storage_errors(self._run.path):
            ids = writer_ids(self._run)
        return max(map(self.of, ids), default=0)


def choose_round(
    run: RunDirectory, num_rows: int, *, retry: bool, job: str = "", array: str = "", cluster: str = "", restart_count: int = 0
) -> int:
    """The round that a start belongs to; it has none of its own in the run directory yet.

    Without `retry` that is the newest one. With it a new one, unless this start is a part of a retry that is there: one that is not
    finished, or one that another task of its job array or an earlier life of its job began; or unless the run is complete without a
    failed row.

    Args:
        num_rows: rows of the input now.
        job: Slurm's job id, "" outside Slurm.
        array: Slurm's id of the job array.
        cluster: inside which these ids are unique.
        restart_count: of this life of the job.

    Raises:
        RunDirectoryError, ResumableError: the files cannot be read.
    """
    with storage_errors(run.path):
        identities = [identity for writer_id in writer_ids(run) if (identity := read_identity(run, writer_id)) is not None]
    newest = max((identity.retry_round for identity in identities), default=0)
    if not retry:
        return newest
    done = run.read_done() or {}
    own = [i.retry_round for i in identities if job and _same_start(i, job, array, cluster, restart_count)]
    finished = done.get("retry_round", 0) >= newest if done else False
    if max(own, default=0) > 0 or (newest > 0 and not finished):
        return newest
    if finished and done.get("num_rows", 0) >= num_rows and not done.get("failed"):
        return newest
    return newest + 1


def _same_start(identity: WriterIdentity, job: str, array: str, cluster: str, restart_count: int) -> bool:
    if identity.cluster != cluster or identity.role != "replica":
        return False
    if identity.job == job:
        return identity.restart_count < restart_count
    return bool(array) and identity.array == array


def check_truncation(run: RunDirectory, retry_round: int, facts: Mapping[str, object]) -> None:
    """Make sure that too long prompts mean the same to all starts of a round.

    They are a part of what a run is, with one exception: where they were failed rows so far, a retry may cut them instead. No row that
    is ok changes by that.

    Args:
        retry_round: of this start.
        facts: `identity.sampling_facts` of this start; "truncate" is there where it is not "error".

    Raises:
        RunDirectoryError: it is another policy than that of this round; ResumableError.
    """
    wanted = str(facts.get("truncate", NO_TRUNCATION))
    with storage_errors(run.path):
        identities = [identity for writer_id in writer_ids(run) if (identity := read_identity(run, writer_id)) is not None]
    before: dict[int, str] = {0: str(run.identity.sampling.get("truncate", NO_TRUNCATION))}
    before.update((i.retry_round, i.truncate) for i in identities if i.role == "replica" and i.retry_round)
    newest = max(number for number in before if number <= retry_round)
    if before[newest] == wanted or (newest < retry_round and before[newest] == NO_TRUNCATION):
        return
    raise RunDirectoryError(
        f"{run.path} belongs to another run",
        found=f"data.truncate: the run has {before[newest]!r}, this job {wanted!r}",
        fix="put the job back as it was, or give another data.output"
        + (f"; from {NO_TRUNCATION!r} it may be changed with --retry-failed" if before[newest] == NO_TRUNCATION else ""),
    )
