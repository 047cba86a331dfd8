"""How much memory a rank may take on its node."""

from __future__ import annotations

from pathlib import Path

_NO_LIMIT_BYTES = 2**60
"""cgroup v1 says "no limit" with a number near 2**63."""


def available_host_bytes(num_local_ranks: int) -> int:
    """This rank's equal share of what is free on the node and in the job's cgroup (v1 and v2), page cache counted as free."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    return min([free, *cgroup_free_bytes()]) // num_local_ranks


def cgroup_free_bytes(
    cgroups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[int]:
    """Bytes left in each memory cgroup that this process is in and that has a limit.

    Args:
        cgroups: the kernel's list of a process's cgroups.
        root: where cgroups are mounted.
    """
    try:
        entries = [line.split(":", 2) for line in cgroups.read_text().splitlines()]
    except OSError:
        return []
    frees: list[int] = []
    for _, controllers, path in entries:
        if controllers == "":
            frees += _free_of_levels(root, path, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            frees += _free_of_levels(root / "memory", path, *names)
    return frees


def _free_of_levels(root: Path, path: str, limit_name: str, used_name: str, prefix: str) -> list[int]:
    """For a cgroup and all that contain it. File pages are given back when memory is asked for, so they count as free."""
    folder = root / path.lstrip("/")
    frees = []
    for level in (folder, *folder.parents):
        if not level.is_relative_to(root):
            break
        try:
            limit = (level / limit_name).read_text().strip()
            used = int((level / used_name).read_text())
            statistics = dict(line.split() for line in (level / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit != "max" and int(limit) < _NO_LIMIT_BYTES:
            cached = sum(int(statistics.get(f"{prefix}{name}_file", 0)) for name in ("inactive", "active"))
            frees.append(max(0, int(limit) - used + cached))
    return frees
