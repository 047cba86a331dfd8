"""The one place that imports `cupy.cuda.nccl`, and what every NCCL communicator of a rank shares."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from hpcinfer.comm.host import HostChannel
from hpcinfer.comm.streams import Streams
from hpcinfer.comm.watchdog import Watchdog
from hpcinfer.errors import ConfigError, LaunchError

DEFAULTS = {"NCCL_LAUNCH_ORDER_IMPLICIT": "1"}
"""Several communicators work on one device at once: their kernels must reach it in the order of the host's calls."""

SHARED_GPU = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "2", "NCCL_SOCKET_IFNAME": "lo"}
"""Several ranks on one GPU, which NCCL otherwise refuses (from 2.30 on by the first; before, by another host id for each rank).
It is slow, and for tests."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nccl:
    """What the NCCL communicators of this rank share."""

    library: Any
    """The module `cupy.cuda.nccl`, or in tests one with its functions."""
    streams: Streams
    """Of this rank's device."""
    watchdog: Watchdog
    """Looks after what is in flight."""


def load_nccl() -> Any:
    """Import `cupy.cuda.nccl`.

    Raises:
        ConfigError: CuPy or its NCCL is missing.
    """
    fix = "install them with the package: pip install '.[cuda13]'"
    try:
        from cupy.cuda import nccl
    except ImportError as cause:
        raise ConfigError(
            "several ranks with GPUs need NCCL through CuPy", found=f"{type(cause).__name__}: {cause}", fix=fix
        ) from cause
    if not nccl.available:
        raise ConfigError("several ranks with GPUs need NCCL through CuPy", found="a CuPy that finds no NCCL library", fix=fix)
    return nccl


def apply_settings(*, share_gpu_rank: int | None = None) -> dict[str, str]:
    """Add what we need to NCCL's settings in the environment of this process. Call it before NCCL's first call, which reads them.

    What the environment has already stands: the user's own, and those of the site (`launch.site`).

    Args:
        share_gpu_rank: a number that differs for every rank, where several ranks share a GPU.

    Returns:
        All NCCL_* variables that are in force.
    """
    wanted = dict(DEFAULTS)
    if share_gpu_rank is not None:
        wanted.update(SHARED_GPU, NCCL_HOSTID=f"rank{share_gpu_rank}")
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("NCCL_")}


def check_versions(library: Any, world: HostChannel) -> str:
    """NCCL's version, "2.28.9". Collective over the world.

    Raises:
        LaunchError: ranks have different ones, which would hang or corrupt at the first collective.
    """
    version = version_text(library.get_version())
    everyone = world.all_gather(version)
    if len(set(everyone)) > 1:
        ranks_of: dict[str, list[int]] = {}
        for rank, found in enumerate(everyone):
            ranks_of.setdefault(found, []).append(rank)
        error = LaunchError(
            "all ranks must have the same NCCL",
            found="; ".join(f"{found} on ranks {', '.join(map(str, ranks))}" for found, ranks in ranks_of.items()),
            fix="use one environment on all nodes (check PATH, modules and LD_LIBRARY_PATH on those that differ)",
        )
        error.agreed = True
        raise error
    return version


def version_text(number: int) -> str:
    """NCCL's version number in words: 22809 -> "2.28.9" (from 2.9 on major * 10000 + minor * 100 + patch)."""
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
