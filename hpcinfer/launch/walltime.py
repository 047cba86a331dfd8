"""When the job ends."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence

from hpcinfer.launch.env import LaunchEnvironment

_TIMEOUT_S = 10.0


def job_end_s(environment: LaunchEnvironment, *, run: Callable[[Sequence[str]], str] | None = None) -> float | None:
    """When the job ends, in seconds since the epoch; None outside a job, without a limit, and where nobody says.

    Its variables are looked at first; Slurm 22.05 and older have none, and are asked by `squeue`.

    Args:
        run: runs a command and returns what it printed, "" where it failed; by default in a process, for at most 10 s.
    """
    if environment.walltime_end_s is not None or environment.job_id is None:
        return environment.walltime_end_s
    command = ["squeue", "--noheader", f"--jobs={environment.job_reference}", "--format=%e"]
    text = (run or _run)(command).strip()
    return float(text) if text.isdecimal() else None


def _run(command: Sequence[str]) -> str:
    try:
        result = subprocess.run(
            # Seconds since the epoch: no time zone to guess.
            command, env={**os.environ, "SLURM_TIME_FORMAT": "%s"}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=_TIMEOUT_S, check=False,
        )
    except (OSError, subprocess.TimeoutExpired):  # no squeue on this node, or a controller that does not answer
        return ""
    return result.stdout if result.returncode == 0 else ""
