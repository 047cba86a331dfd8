"""How a rank ends: one readable report, and all the other ranks with it.

Without this an exception in one rank leaves the others waiting for ever in their next collective: every MPI library
hangs in finalize.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable

from hpcinfer.errors import ExitCode, HpcinferError
from hpcinfer.launch.env import LaunchEnvironment

ABORT_TIMEOUT_S = 2
FORWARD_S = 0.3
"""A launcher that is told to abort may drop what it has not forwarded yet: the report needs this long to get through."""
INIT_TIMEOUT_S = 30
"""Before MPI is up the others may still be importing; a rank that has not met them by then kills itself instead."""
CANCEL_TIMEOUT_S = 5
AGREED_TIMEOUT_S = 10
INTERRUPTED = 130


@dataclasses.dataclass
class Place:
    """Who and where this process is. `main` fills it in once the world is up; before, it is what the launcher says."""

    rank: int = 0
    size: int = 1
    host: str = dataclasses.field(default_factory=socket.gethostname)
    abort: Callable[[int], None] | None = None
    """Ends all ranks with an exit code (MPI_Abort); None before MPI is up."""

    @classmethod
    def from_environ(cls) -> Place:
        """The place that the launcher's variables describe: who prints, should MPI not come up."""
        environment = LaunchEnvironment.from_environ()
        return cls(rank=environment.launcher_rank, size=environment.expected_ranks)

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size} on host {self.host}"


def run_as_rank(main: Callable[[Place], int | None], place: Place | None = None) -> int:
    """Run `main(place)` and return its exit code; on an error print one report and end all ranks within seconds.

    An error that all ranks raise together (`agreed` is set on it: see `parallel.agree.agree_or_raise` and
    `launch.guard`) is printed by rank 0 alone and returned as its exit code by all. Any other error is printed by the
    rank that it happened on, which then ends the whole world: MPI_Abort, and SIGKILL of itself where that does not
    return (the launcher then ends the rest).
    """
    place = place or Place.from_environ()
    try:
        return int(main(place) or 0)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if code == 0:
            return 0
        if isinstance(stop.code, str):
            _print(stop.code)
        end_all(place, code)
        return code
    except KeyboardInterrupt:
        if place.rank == 0:
            _print("hpcinfer: interrupted")
        end_all(place, INTERRUPTED)
        return INTERRUPTED
    except BaseException as error:
        code = int(error.exit_code) if isinstance(error, HpcinferError) else int(ExitCode.FAILED)
        if getattr(error, "agreed", False):
            if place.rank == 0:
                _print(describe(error, place))
            if place.size > 1:
                _kill_after(AGREED_TIMEOUT_S)
            return code
        end_with(error, place)
        return code


def end_with(error: BaseException, place: Place) -> None:
    """Report an error that only this rank has, and end all the others. Returns only in a process that is alone."""
    _print(describe(error, place))
    end_all(place, int(error.exit_code) if isinstance(error, HpcinferError) else int(ExitCode.FAILED))


def describe(error: BaseException, place: Place) -> str:
    """The report of an error: what, found, fix, rank and host; with a traceback where the error is not one of ours."""
    head = f"hpcinfer: error on {place}"
    if isinstance(error, HpcinferError):
        return f"{head}\n{type(error).__name__}: {error}"
    return f"{head}\n{''.join(traceback.format_exception(error)).rstrip()}"


def end_all(place: Place, code: int) -> None:
    """End every rank with exit code `code`. Returns only in a process that is alone."""
    if place.abort is None and place.size == 1:
        return
    _kill_after(ABORT_TIMEOUT_S if place.abort else INIT_TIMEOUT_S)
    time.sleep(FORWARD_S)
    (place.abort or _abort_before_start)(code)
    # Open MPI's abort may return before the launcher has acted.
    time.sleep(ABORT_TIMEOUT_S)
    os.kill(os.getpid(), signal.SIGKILL)


def _abort_before_start(code: int) -> None:
    """This rank failed before MPI was up, and the others wait for it there, for ever: join them to end them. Where it has no MPI to
    join them with, srun without -K1 would let them wait: the whole step is cancelled."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        _cancel_step(LaunchEnvironment.from_environ())
        os.kill(os.getpid(), signal.SIGKILL)
    MPI.COMM_WORLD.Abort(code)


def _cancel_step(environment: LaunchEnvironment) -> None:
    if environment.launcher != "srun":
        return
    command = ["scancel", "--signal=KILL", f"{environment.job_id}.{environment.step_id}"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # no scancel here, or no controller that answers
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=CANCEL_TIMEOUT_S, check=False)


def _kill_after(seconds: int) -> None:
    # The kernel's own alarm: it also ends a process that is stuck in C code or in the interpreter's exit. Only the main thread
    # may set a handler; nobody here does, so that on another one the alarm still kills.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)


def _print(text: str) -> None:
    """One write, so that the reports of several ranks do not mix."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(2, (text.rstrip("\n") + "\n").encode(errors="replace"))
