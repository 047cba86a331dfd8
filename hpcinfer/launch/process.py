"""Ties of a rank to the process that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent() -> bool:
    """Have the kernel kill this process when its parent (a launcher's proxy, slurmstepd) dies: no orphan writes on.

    Call it first thing in a rank. A rank whose launcher is killed outright would otherwise keep running, and even keep
    exchanging data with its neighbours over shared memory.

    Returns:
        False where the system has no such call (it is Linux's own).
    """
    if not sys.platform.startswith("linux"):
        return False
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        return False
    if os.getppid() != parent:
        # It died between the two calls: nobody will send the signal any more.
        os.kill(os.getpid(), signal.SIGKILL)
    return True
