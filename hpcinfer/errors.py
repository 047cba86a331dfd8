"""Every error that a user, a file or a cluster can cause.

A message says what was asked, what was found and what to do. Which rank and host it happened on is added where errors are
reported (`launch.report`), so that no code below needs to know its rank in order to raise.
"""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """Exit codes of every verb. Completion of a run is a file, never an exit code."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    RESUMABLE = 3


class HpcinferError(Exception):
    """Base class: `problem` (what was asked and why it cannot be), `found` (the numbers), `fix` (what to do)."""

    exit_code = ExitCode.FAILED
    agreed = False
    """Set where all ranks raise the same error together, so that it is reported once."""

    def __init__(self, problem: str, *, found: str = "", fix: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.found = found
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.problem]
        if self.found:
            lines.append(f"  found: {self.found}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)

    def __reduce__(self):
        # Errors found by one rank travel to the others.
        return (_rebuild, (type(self), self.problem, self.found, self.fix))


def _rebuild(kind: type, problem: str, found: str, fix: str) -> HpcinferError:
    return kind(problem, found=found, fix=fix)


class UsageError(HpcinferError):
    """The command line is wrong."""

    exit_code = ExitCode.USAGE


class ConfigError(HpcinferError):
    """The job file, an override, or a misfit of layout, model and machine that is known before anything is loaded."""

    exit_code = ExitCode.USAGE


class LaunchError(HpcinferError):
    """The ranks were not started as the job needs them (singleton worlds, wrong count, no MPI)."""


class CommunicationError(HpcinferError):
    """A transfer was misused, failed or did not finish before its deadline."""


class LostPeerError(CommunicationError):
    """A transfer failed on the way or missed its deadline, or a rank fell silent: a process, a node or the network is stuck or gone.
    Starting again goes on, perhaps on other nodes; what would happen again is bounded by the number of lives without rows.
    """

    exit_code = ExitCode.RESUMABLE


class ReplicaDivergedError(HpcinferError):
    """Ranks of one replica no longer agree on the state of their scheduler."""


class CheckpointError(HpcinferError):
    """A model folder is incomplete, unreadable or of a kind that is not supported."""


class DataError(HpcinferError):
    """An input or output file is missing, malformed or not what it says."""


class RowError(HpcinferError):
    """One row cannot be run. It becomes a failed row in the output and never ends the run."""


class RunDirectoryError(HpcinferError):
    """A run directory cannot be used, or belongs to another model, input or sampling."""


class ResumableError(HpcinferError):
    """The run stopped for a reason outside it (full disk, lower memory budget); starting it again goes on."""

    exit_code = ExitCode.RESUMABLE


class LivesError(HpcinferError):
    """A Slurm job was started again too often, or to no effect. Starting it once more does not help."""


class TooManyFailedRows(HpcinferError):
    """More rows failed than `--max-failed` allows."""
