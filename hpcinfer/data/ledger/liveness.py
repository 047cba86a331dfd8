"""Rules that tell live writers from dead and silent ones."""

from __future__ import annotations

import enum
import os
import time
from collections.abc import Callable
from typing import Any

from hpcinfer.data.ledger.run_directory import RunDirectory
from hpcinfer.data.ledger.writers import (
    WriterIdentity,
    boot_id,
    is_identity_file,
    pid_namespace,
    process_start,
    read_heartbeat,
    read_identity,
)

STALE_AFTER_S = 120.0


def is_gone_from_this_machine(identity: WriterIdentity, own_boot_id: str | None = None) -> bool:
    """True when the writer ran on this boot of this machine, in this pid namespace, and its process is gone. False
    otherwise, also where that cannot be told.
    """
    own_boot_id = boot_id() if own_boot_id is None else own_boot_id
    if not identity.boot_id or identity.boot_id != own_boot_id or identity.pid_namespace != pid_namespace():
        return False
    start = process_start(identity.pid)
    return start is None or bool(start and identity.pid_start and start != identity.pid_start)


class Verdict(enum.Enum):
    """What a reader may believe about a writer."""

    LIVE = "live"
    SILENT = "silent"
    """Its counter has not moved for a while; it may be slow, or cut off, or gone."""
    DEAD = "dead"
    LEFT = "left"
    """It said that it ended."""


class Liveness:
    """Tells live writers from dead and silent ones.

    Dead at once: same boot id and pid namespace with the process gone; the same Slurm job seen with a higher restart
    count. Otherwise a counter that stays the same for `stale_after_s` on this reader's own monotonic clock means
    silent: modification times are never used (NFS caches them for a minute, and clocks differ between nodes). Slurm is
    not asked: a controller that answers late would stop the ranks that ask.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        stale_after_s: float = STALE_AFTER_S,
        clock: Callable[[], float] = time.monotonic,
        own_boot_id: str | None = None,
    ) -> None:
        self._run = run
        self._stale_after_s = stale_after_s
        self._clock = clock
        self._boot_id = boot_id() if own_boot_id is None else own_boot_id
        self._identities: dict[str, WriterIdentity] = {}
        self._seen: dict[str, tuple[object, float]] = {}
        self._final: dict[str, Verdict] = {}
        self._restarts: dict[tuple[str, str], int] = {}

    def refresh(self) -> None:
        """Reads the identities of writers that are new, so that restarted jobs are known. Raises OSError."""
        for name in os.listdir(self._run.writers):
            if is_identity_file(name):
                self.identity(name.removesuffix(".json"))

    def identity(self, writer_id: str) -> WriterIdentity | None:
        """Who a writer is, read once."""
        if writer_id not in self._identities:
            identity = read_identity(self._run, writer_id)
            if identity is None:
                return None
            self._identities[writer_id] = identity
            if identity.job:
                key = (identity.cluster, identity.job)
                self._restarts[key] = max(self._restarts.get(key, 0), identity.restart_count)
        return self._identities[writer_id]

    def verdict(self, writer_id: str) -> Verdict:
        """The verdict on a writer now. An unknown id ("" for a claim without an owner) can only fall silent."""
        if writer_id in self._final:
            return self._final[writer_id]
        beat = read_heartbeat(self._run, writer_id) if writer_id else {}
        verdict = self._judge(writer_id, beat)
        if verdict in (Verdict.DEAD, Verdict.LEFT):
            self._final[writer_id] = verdict
        return verdict

    def unowned_verdict(self, key: str) -> Verdict:
        """The verdict on a claim whose file names no owner (killed between creating and writing it, without links)."""
        return self._by_counter(f"claim {key}", None)

    def _judge(self, writer_id: str, beat: dict[str, Any]) -> Verdict:
        if beat.get("state") == "left":
            return Verdict.LEFT
        identity = self.identity(writer_id) if writer_id else None
        if identity is not None and self._is_gone(identity):
            return Verdict.DEAD
        return self._by_counter(writer_id, beat.get("counter"))

    def _by_counter(self, key: str, counter: object) -> Verdict:
        now = self._clock()
        before = self._seen.get(key)
        if before is None or before[0] != counter:
            self._seen[key] = (counter, now)
            return Verdict.LIVE
        return Verdict.SILENT if now - before[1] >= self._stale_after_s else Verdict.LIVE

    def _is_gone(self, identity: WriterIdentity) -> bool:
        if is_gone_from_this_machine(identity, self._boot_id):
            return True
        if not identity.job:
            return False
        return identity.restart_count < self._restarts.get((identity.cluster, identity.job), 0)
