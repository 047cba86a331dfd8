"""Writers: one life of a replica each, with an id that no other life has, and a heartbeat.

`writers/<id>.json` says who it is and never changes; `writers/<id>.beat` says how far it is and is replaced as it goes.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpcinfer.data.ledger.commit import create_new, is_transient, replace_bytes, write_all
from hpcinfer.data.ledger.run_directory import RunDirectory, unusable


class Leaving(enum.StrEnum):
    """Why a writer left, in its last heartbeat."""

    DONE = "done"
    """Every row of the run is committed."""
    NO_ROWS = "no rows"
    """Other writers have all that is left."""
    DRAINED = "drained"
    """It was asked to stop."""
    FAILED = "failed"
    """By an error."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WriterIdentity:
    """Who a writer is. `of_this_process` fills in what the machine knows."""

    host: str = ""
    boot_id: str = ""
    """Kernel boot id: the same one means the same machine, not rebooted."""
    pid_namespace: str = ""
    """Process ids mean the same thing only inside one of these."""
    pid: int = 0
    pid_start: int = 0
    """Start time of the process in clock ticks since boot: a process id comes back, the pair does not."""
    cluster: str = ""
    """Slurm cluster name; job ids are unique inside one."""
    job: str = ""
    """Slurm job id (of the array task), "" outside Slurm."""
    step: str = ""
    restart_count: int = 0
    """How often Slurm has requeued the job."""
    layout: str = ""
    """The parallel layout in words, for people."""
    role: str = "replica"
    """"replica", or "merge" for a merge started by hand."""
    num_rows: int = 0
    """Rows of the input as this life sees it."""
    array: str = ""
    """Slurm's id of the job array that the job is a task of."""
    retry_round: int = 0
    """How often failed rows had been given another try, this start's included (`rounds`)."""
    truncate: str = "error"
    """What too long prompts meant to it (`data.truncate`)."""

    @staticmethod
    def of_this_process(**facts: Any) -> WriterIdentity:
        """The identity of the calling process; `facts` are the fields that only the launcher knows."""
        pid = os.getpid()
        return WriterIdentity(
            host=socket.gethostname(),
            boot_id=boot_id(),
            pid_namespace=pid_namespace(),
            pid=pid,
            pid_start=process_start(pid) or 0,
            **facts,
        )


def boot_id() -> str:
    """Id of this boot of the kernel, "" where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def pid_namespace() -> str:
    """Name of this process's pid namespace, "" where there is none."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def process_start(pid: int) -> int | None:
    """Start time in clock ticks since boot; 0 where it cannot be read; None when there is no such process (or a
    zombie).
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass  # It exists and belongs to somebody else.
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # The command name may hold spaces and brackets: fields are counted from the last bracket.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


class Writer:
    """This life's entry in the run directory, and its heartbeat.

    The counter advances in `step_finished` alone; the file is written at most every `interval_s` seconds, and at once
    when the state changes. A heartbeat that cannot be written (full disk) is skipped: work goes on, others merely see
    silence.
    """

    def __init__(
        self,
        run: RunDirectory,
        writer_id: str,
        identity: WriterIdentity,
        *,
        interval_s: float,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self.id = writer_id
        """16 hexadecimal digits."""
        self.identity = identity
        self._run = run
        self._interval_s = interval_s
        self._clock = clock
        self._wall_clock = wall_clock
        self._counter = 0
        self._figures: dict[str, float] = {}
        self._state = "starting"
        self._reason = ""
        self._written_at = float("-inf")
        self.num_skipped = 0
        """Heartbeats that the file system refused."""

    def step_finished(self, **figures: float) -> None:
        """A step is done (or, when idle, a look around): the counter advances. `figures` are numbers for `status`;
        they stay until they are given again. Those that `read_status` knows: rows_ok, rows_failed, rows_partial (all
        committed), rows_claimed, prompt_tokens, output_tokens; rows_per_s and output_tokens_per_s of the whole life, both
        with `_now` for the last minutes; running_s, since it began to generate.
        """
        self._counter += 1
        self._figures.update(figures)
        if self._clock() - self._written_at >= self._interval_s:
            self._write()

    def set_state(self, state: str, **figures: float) -> None:
        """One of starting, loading, running, idle, draining, merging, left. Written at once."""
        self._state = state
        self._figures.update(figures)
        self._write()

    def leave(self, reason: Leaving = Leaving.DONE, **figures: float) -> None:
        """The last word: its unfinished claims are free from now on. To be said after the last commit."""
        self._reason = reason.value
        self.set_state("left", **figures)

    def _write(self) -> None:
        beat = {"counter": self._counter, "state": self._state, "at": self._wall_clock(), "interval_s": self._interval_s}
        beat |= {"reason": self._reason} if self._reason else {}
        beat |= self._figures
        self._written_at = self._clock()
        try:
            replace_bytes(self._run.writers, f"{self.id}.beat", json.dumps(beat).encode())
        except OSError as error:
            if not is_transient(error):
                raise unusable(self._run.path, error) from error
            self.num_skipped += 1


def register_writer(
    run: RunDirectory,
    identity: WriterIdentity,
    *,
    interval_s: float = 2.0,
    clock: Callable[[], float] = time.monotonic,
    wall_clock: Callable[[], float] = time.time,
    draw_id: Callable[[], str] = lambda: secrets.token_hex(8),
) -> Writer:
    """Draws an id, claims it by O_EXCL creation of `writers/<id>.json`, and writes the first heartbeat.

    Raises RunDirectoryError (read-only, no permission), ResumableError (full disk).
    """
    try:
        while True:
            writer_id = draw_id()
            try:
                descriptor = create_new(identity_path(run, writer_id))
            except FileExistsError:
                continue
            try:
                # The claims of this writer are links to this file.
                write_all(descriptor, json.dumps({"id": writer_id, **dataclasses.asdict(identity)}, indent=1).encode())
            finally:
                os.close(descriptor)
            break
    except OSError as error:
        raise unusable(run.path, error) from error
    writer = Writer(run, writer_id, identity, interval_s=interval_s, clock=clock, wall_clock=wall_clock)
    writer.set_state("starting")
    return writer


def writer_ids(run: RunDirectory) -> list[str]:
    """Ids of all lives, sorted. Raises OSError."""
    return sorted(name.removesuffix(".json") for name in os.listdir(run.writers) if is_identity_file(name))


def identity_path(run: RunDirectory, writer_id: str) -> Path:
    """`writers/<id>.json`."""
    return run.writers / f"{writer_id}.json"


def is_identity_file(name: str) -> bool:
    """Whether a name in the folder of writers is that of an identity."""
    return name.endswith(".json") and len(name) == 21 and not name.startswith(".")


def read_identity(run: RunDirectory, writer_id: str) -> WriterIdentity | None:
    """Who a writer is, or None while (or if) its file is not whole."""
    facts = _read_object(identity_path(run, writer_id))
    if facts is None:
        return None
    known = {field.name for field in dataclasses.fields(WriterIdentity)}
    return WriterIdentity(**{key: value for key, value in facts.items() if key in known})


def read_heartbeat(run: RunDirectory, writer_id: str) -> dict[str, Any]:
    """The last heartbeat: counter, state, at (its own wall clock) and figures; {} where there is none."""
    return _read_object(run.writers / f"{writer_id}.beat") or {}


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        facts = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None
