"""Room for what the run will write: free space, inodes and quota."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
from pathlib import Path

from hpcinfer.config.job import JobConfig
from hpcinfer.data.ledger.status import read_status
from hpcinfer.doctor.finding import Finding, absent, green, red, yellow
from hpcinfer.units import format_bytes, format_count

LIKELY_SHARE = 0.5
"""Of sampling.max_tokens, for most rows."""
TEXT_BYTES_A_TOKEN = 4.5
ROW_BYTES = 80
"""Of a generation beside its text and token ids."""
NUM_FILES = 20_000
"""Claims of a large run; they are links where the file system has links, and writers keep segments below that."""
FEW_FILES = 1000
_TIMEOUT_S = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Writes:
    """What a run still has to write."""

    likely_bytes: float
    most_bytes: float
    """With sampling.max_tokens in every row."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Quota:
    """Limits of one user; None where there is none."""

    free_bytes: int | None
    free_files: int | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SpaceFacts:
    """Of the file system of a folder."""

    folder: str
    free_bytes: int
    free_files: int | None
    """None where it has no fixed number of inodes."""
    quota: Quota | None = None
    """None where no tool tells."""


def gather_space(folder: Path) -> SpaceFacts:
    """Ask the file system of `folder`, and the tools that know quotas. Raises OSError."""
    numbers = os.statvfs(folder)
    return SpaceFacts(
        folder=str(folder), free_bytes=numbers.f_bavail * numbers.f_frsize,
        free_files=numbers.f_favail if numbers.f_files else None, quota=_ask_quota(folder),
    )


def expected_writes(job: JobConfig, num_rows: int) -> Writes:
    """From the number of prompts: segments of the rows that are left, and the merged file of all rows beside them."""
    total = num_rows * job.sampling.n
    left = total
    if os.path.isfile(Path(job.data.output) / "run.json"):
        status = read_status(job.data.output)
        left = max(total - status.num_done - status.num_failed, 0)
        total = 0 if status.complete else total

    def bytes_of(share: float) -> float:
        return (left + total) * (ROW_BYTES + share * job.sampling.max_tokens * (4 + TEXT_BYTES_A_TOKEN))

    return Writes(likely_bytes=bytes_of(LIKELY_SHARE), most_bytes=bytes_of(1.0))


def judge_space(facts: SpaceFacts, writes: Writes | None) -> list[Finding]:
    """Room against need. `writes`: None without a job."""
    quota = facts.quota
    return [
        _room("free space", facts.free_bytes, f"in {facts.folder}", writes),
        _files(facts.free_files, facts.folder),
        absent("quota", "no quota tool here knows this file system") if quota is None
        else green("quota", "no limit") if quota.free_bytes is None and quota.free_files is None
        else _quota(quota, writes),
    ]


def _room(check: str, free: int, where: str, writes: Writes | None) -> Finding:
    if writes is None:
        return green(check, f"{format_bytes(free)} {where}")
    likely, most = format_bytes(writes.likely_bytes), format_bytes(writes.most_bytes)
    found = f"{format_bytes(free)} {where}; the run will write about {likely}, at most {most}"
    fix = "make room, choose another data.output, or lower sampling.max_tokens; a run that fills the disk can go on later"
    if free < writes.likely_bytes:
        return red(check, found, fix)
    return yellow(check, found, fix) if free < writes.most_bytes else green(check, found)


def _files(free: int | None, folder: str) -> Finding:
    if free is None:
        return green("inodes", f"no fixed number in {folder}")
    found = f"{format_count(free)} free in {folder}; a large run makes up to {format_count(NUM_FILES)} files"
    fix = "remove small files there, or choose another data.output"
    if free < FEW_FILES:
        return red("inodes", found, fix)
    return yellow("inodes", found, fix) if free < NUM_FILES else green("inodes", found)


def _quota(quota: Quota, writes: Writes | None) -> Finding:
    if quota.free_files is not None and quota.free_files < FEW_FILES:
        return red("quota", f"{format_count(quota.free_files)} files are left of it", "remove files, or have it raised")
    if quota.free_bytes is None:
        return green("quota", f"{format_count(quota.free_files)} files are left of it")
    return _room("quota", quota.free_bytes, "are left of it", writes)


def _ask_quota(folder: Path) -> Quota | None:
    """Lustre's own tool, else the one of local file systems and NFS."""
    lustre = ["lfs", "quota", "-q", "-u", str(os.getuid()), str(folder)]
    local = ["quota", "-u", "-w", "-p", "-f", _mount_of(folder)]
    for command in (lustre, local):
        if shutil.which(command[0]) is None:
            continue
        try:
            result = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            continue
        if (quota := parse_quota(result.stdout)) is not None:
            return quota
    return None


def parse_quota(text: str) -> Quota | None:
    """From what `lfs quota` or `quota -p` prints: name, KiB used, soft, hard and grace, files used, soft, hard and grace.

    A hard limit of 0 is none; a number that is over its limit has a star. None where there is no such line.
    """
    number, grace = r"(\d+)k?\*?", r"[-\w]+"
    match = re.search(rf"\S+\s+{number}\s+{number}\s+{number}\s+{grace}\s+{number}\s+{number}\s+{number}\s+{grace}", text)
    if match is None:
        return None
    used, _, hard, files, _, most_files = map(int, match.groups())
    return Quota(
        free_bytes=max(hard - used, 0) * 1024 if hard else None,
        free_files=max(most_files - files, 0) if most_files else None,
    )


def _mount_of(folder: Path) -> str:
    """Where the file system of a folder is mounted."""
    folder = folder.resolve()
    return str(next(each for each in (folder, *folder.parents) if each.is_mount()))
