"""One software environment on all ranks: what differs between nodes fails late, or gives other numbers."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import torch

import hpcinfer
from hpcinfer.comm.nccl_library import load_nccl, version_text
from hpcinfer.doctor.finding import Finding, RankPlace, by_value, green, red, who, yellow
from hpcinfer.errors import ConfigError

PACKAGES = ("numpy", "h5py", "mpi4py", "tokenizers", "safetensors", "triton", "flash-attn", "flashinfer-python", "nccl4py")
"""Those that are installed; they are asked of their metadata and not imported."""
CUPY_PACKAGES = ("cupy-cuda13x", "cupy-cuda12x", "cupy")
SHOWN = ("hpcinfer", "python", "torch", "CUDA of torch", "NVIDIA driver", "cupy", "NCCL")
"""In the table, where all are well."""
HARMLESS = ("kernel",)
"""These may differ."""
_NONE = "none"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VersionFacts:
    """What one rank would run with."""

    place: RankPlace
    versions: dict[str, str]
    """Name -> version; "none" where it is not installed."""


def gather_versions(place: RankPlace, *, mpi: str, has_gpu: bool) -> VersionFacts:
    """This rank's own.

    Args:
        mpi: library and version, "" for none.
        has_gpu: torch sees one; only then is NCCL loaded to be asked.
    """
    versions = {
        "hpcinfer": hpcinfer.__version__, "python": platform.python_version(), "torch": torch.__version__,
        "MPI": mpi or _NONE, "CUDA of torch": torch.version.cuda or _NONE, "NVIDIA driver": driver_version() or _NONE,
        "cupy": next((found for name in CUPY_PACKAGES if (found := _installed(name)) != _NONE), _NONE),
        "NCCL": _nccl_version() if has_gpu else _NONE,
    }
    versions |= {name: _installed(name) for name in PACKAGES}
    return VersionFacts(place=place, versions=versions | {"kernel": platform.release()})


def judge_versions(facts: Sequence[VersionFacts]) -> list[Finding]:
    """A finding for each name that differs; one for all where none does."""
    findings = []
    for name in facts[0].versions:
        groups = by_value((each.place, each.versions.get(name, _NONE)) for each in facts)
        if len(groups) > 1:
            findings.append(_skewed(name, groups))
    if all(finding.check == _check(name) for finding in findings for name in HARMLESS):
        first = facts[0].versions
        shown = ", ".join(f"{name} {first[name]}" for name in SHOWN if first.get(name, _NONE) != _NONE)
        findings.insert(0, green("versions", shown if len(facts) == 1 else f"equal on all ranks: {shown}"))
    return findings


def driver_version(proc: Path = Path("/proc")) -> str:
    """Of the NVIDIA kernel driver; "" without one."""
    try:
        text = (proc / "driver/nvidia/version").read_text()
    except OSError:
        return ""
    match = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", text)
    return match.group(1) if match else "unknown"


def _skewed(name: str, groups: dict[str, list[RankPlace]]) -> Finding:
    most, *others = groups
    odd = [place for version in others for place in groups[version]]
    text = "; ".join(f"{version} on {who(groups[version])}" for version in others)
    found = f"{name} {text}, {most} on the other {len(groups[most])}"
    if name in HARMLESS:
        return yellow(_check(name), found, "nothing, unless only these nodes make trouble", odd)
    return red(
        _check(name), found,
        "use one environment on all nodes: look at PATH, modules, PYTHONPATH and LD_LIBRARY_PATH there, and at copies of the "
        "environment on node-local disks", odd,
    )


def _check(name: str) -> str:
    return f"versions: {name}"


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return _NONE


def _nccl_version() -> str:
    try:
        return version_text(load_nccl().get_version())
    except ConfigError as error:
        return f"{_NONE} ({error.found})"
