"""The one place that imports `mpi4py.MPI`, which initialises MPI.

Nothing else imports it at module level, so that a single process works where no MPI is installed, and so that a process
which is about to exec `mpiexec` never initialises MPI before.
"""

from __future__ import annotations

import sys
from typing import Any

from hpcinfer.errors import LaunchError
from hpcinfer.launch.env import LaunchEnvironment
from hpcinfer.launch.guard import check_world, linger


def load_mpi() -> Any:
    """Initialise MPI with full thread support (the first time) and return the module `mpi4py.MPI`.

    Raises:
        LaunchError: mpi4py or its MPI library is missing, or MPI grants less than THREAD_MULTIPLE.
    """
    if "mpi4py.MPI" in sys.modules:
        return sys.modules["mpi4py.MPI"]
    try:
        import mpi4py

        mpi4py.rc.thread_level = "multiple"
        from mpi4py import MPI
    except (ImportError, RuntimeError) as cause:
        raise LaunchError(
            "several ranks need MPI, and it could not be loaded",
            found=f"{type(cause).__name__}: {cause}; python {sys.executable}",
            fix="install it into this environment: pip install '.[mpich]'",
        ) from cause
    granted = MPI.Query_thread()
    if granted != MPI.THREAD_MULTIPLE:
        names = {MPI.THREAD_SINGLE: "SINGLE", MPI.THREAD_FUNNELED: "FUNNELED", MPI.THREAD_SERIALIZED: "SERIALIZED"}
        raise LaunchError(
            "MPI must grant THREAD_MULTIPLE: transfers progress on a thread of their own",
            found=f"THREAD_{names.get(granted, granted)} from {MPI.get_vendor()}",
            fix="use an MPI built with thread support, and let hpcinfer initialise it",
        )
    return MPI


def load_launched_mpi(environment: LaunchEnvironment) -> Any:
    """`load_mpi` in a rank of a launcher, with the check that its world is what the launcher started. Needs no torch, so that a
    wrong launch is said at once.

    Args:
        environment: of this process.

    Raises:
        LaunchError: see `load_mpi` and `launch.guard.check_world`.
    """
    try:
        MPI = load_mpi()
    except LaunchError:
        linger(environment)
        raise
    check_world(environment, MPI.COMM_WORLD.Get_size(), MPI.COMM_WORLD.Get_rank(), vendor=MPI.get_vendor()[0])
    return MPI


def describe_mpi() -> str:
    """Vendor and version of the MPI in use, on one line, for headers and logs."""
    MPI = load_mpi()
    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(str(part) for part in version)}"
