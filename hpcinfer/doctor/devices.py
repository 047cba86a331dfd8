"""GPUs: seen by every rank, one for each, nobody else's work on them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from hpcinfer.comm.device import shared_gpus
from hpcinfer.comm.nccl_library import load_nccl
from hpcinfer.doctor.finding import Finding, Level, RankPlace, absent, by_value, green, places_of, red, red_error, who, yellow
from hpcinfer.doctor.versions import driver_version
from hpcinfer.errors import ConfigError
from hpcinfer.launch.env import LaunchEnvironment
from hpcinfer.units import format_bytes

USED_SHARE = 0.05
"""Of a GPU's memory; more than this before anything was started is somebody else's work."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DeviceFacts:
    """The GPU that one rank would compute on."""

    place: RankPlace
    num_visible: int
    """GPUs that torch sees here."""
    uuid: str = ""
    name: str = ""
    total_bytes: int = 0
    free_bytes: int = 0
    pci: str = ""
    """Address on the PCI bus, for example "0000:1b:00.0"; "" where it is not known."""
    torch_build: str = ""
    """Version of torch, and of the CUDA that it is built for."""
    driver: str = ""
    """Version of the NVIDIA driver; "" without one."""
    visible_devices: tuple[str, ...] | None = None
    """CUDA_VISIBLE_DEVICES; None where it is unset."""
    nccl_error: str = ""
    """Why NCCL cannot be had through CuPy."""

    @property
    def has_gpu(self) -> bool:
        return self.num_visible > 0


def gather_device(place: RankPlace, environment: LaunchEnvironment, *, proc: Path = Path("/proc")) -> DeviceFacts:
    """This rank's own. Makes the GPU by the rank's number on its node the current one, as a run does.

    Args:
        proc: root of /proc.
    """
    count = torch.cuda.device_count() if torch.version.cuda else 0
    facts = DeviceFacts(
        place=place, num_visible=count, driver=driver_version(proc), visible_devices=environment.visible_devices,
        torch_build=f"torch {torch.__version__} {f'for CUDA {torch.version.cuda}' if torch.version.cuda else 'without CUDA'}",
    )
    if count == 0:
        return facts
    index = place.local_rank % count
    torch.cuda.set_device(index)
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    uuid = str(properties.uuid)
    return dataclasses.replace(
        facts, uuid=uuid, name=properties.name, free_bytes=free, total_bytes=total, pci=pci_address(uuid, proc),
        nccl_error=_nccl_error(),
    )


def pci_address(uuid: str, proc: Path = Path("/proc")) -> str:
    """Where the driver says that a GPU is; "" where it does not."""
    for information in sorted((proc / "driver/nvidia/gpus").glob("*/information")):
        try:
            text = information.read_text()
        except OSError:
            continue
        match = re.search(r"GPU UUID:\s*(?:GPU-)?(\S+)", text)
        if match and match.group(1) == uuid.removeprefix("GPU-"):
            return information.parent.name
    return ""


def judge_devices(facts: Sequence[DeviceFacts], *, setting: str = "auto") -> list[Finding]:
    """GPUs of all ranks. `setting`: engine.device of the job."""
    with_gpu = [each for each in facts if each.has_gpu]
    if setting == "cpu":
        return [absent("GPUs", 'not used: engine.device = "cpu"')]
    if not with_gpu:
        return [_no_gpu(facts, setting)]
    findings = [*_without(facts), *_shared(facts)] or _kinds(facts)
    return [*findings, *_judge_nccl(with_gpu, len(facts)), *_judge_used(with_gpu)]


def gpus_usable(findings: Sequence[Finding], facts: Sequence[DeviceFacts]) -> bool:
    """Whether transfers between GPUs can be tried: all ranks have one of their own, and NCCL."""
    return all(each.has_gpu and not each.nccl_error for each in facts) and not any(
        finding.level is Level.RED and finding.check in ("GPUs", "NCCL", "versions: NCCL", "versions: cupy")
        for finding in findings
    )


def _without(facts: Sequence[DeviceFacts]) -> list[Finding]:
    without = [each.place for each in facts if not each.has_gpu]
    if not without:
        return []
    return [red(
        "GPUs", f"no GPU for {who(without)}, one for each of the other {len(facts) - len(without)}",
        "ask Slurm for as many on every node (--gpus-per-node), look at CUDA_VISIBLE_DEVICES and nvidia-smi there; or set "
        'engine.device = "cpu"', without,
    )]


def _shared(facts: Sequence[DeviceFacts]) -> list[Finding]:
    """Two ranks with one GPU. A rank without any counts as one with a GPU of its own."""
    gpus = [(each.place.host, each.uuid or f"of rank {each.place.rank}") for each in facts]
    error = shared_gpus(gpus)
    if error is None:
        return []
    groups = by_value(zip(places_of(facts), gpus, strict=True))
    return [red_error("GPUs", error, [places[0] for places in groups.values() if len(places) > 1])]


def _kinds(facts: Sequence[DeviceFacts]) -> list[Finding]:
    kinds = by_value((each.place, each.name) for each in facts)
    text = "; ".join(f"{name} ({len(places)})" for name, places in kinds.items())
    findings = [green("GPUs", f"one for each rank: {text}")]
    if len(kinds) > 1:
        findings.append(yellow(
            "GPU kinds", text, "ranks wait for the slowest: keep a replica on one kind (sbatch --constraint)",
            [place for places in list(kinds.values())[1:] for place in places],
        ))
    return findings


def _no_gpu(facts: Sequence[DeviceFacts], setting: str) -> Finding:
    first = facts[0]
    given = [each for each in facts if each.visible_devices]
    if first.driver:
        found = f"the NVIDIA driver is {first.driver}, and {first.torch_build} sees no GPU"
        fix = (
            "install a CUDA build: pip install '.[cuda13]'" if "without CUDA" in first.torch_build else
            "ask Slurm for GPUs (--gpus-per-node); where nvidia-smi shows them, the driver is too old for this CUDA, or "
            "CUDA_VISIBLE_DEVICES is empty"
        )
        return red("GPUs", found, f'{fix}; or set engine.device = "cpu"', places_of(facts))
    if given:
        return red(
            "GPUs", f"CUDA_VISIBLE_DEVICES={','.join(given[0].visible_devices)}, no driver, {first.torch_build}",
            "look at nvidia-smi and the driver there", places_of(given),
        )
    if setting == "cuda":
        found = f'engine.device = "cuda", no NVIDIA driver, {first.torch_build}'
        return red("GPUs", found, 'run on nodes with GPUs, or set engine.device = "cpu"')
    return absent("GPUs", f"no NVIDIA driver, {first.torch_build}: ranks compute on CPUs")


def _judge_nccl(facts: Sequence[DeviceFacts], num_ranks: int) -> list[Finding]:
    broken = [each for each in facts if each.nccl_error]
    if num_ranks == 1 or not broken:
        return []
    return [red(
        "NCCL", f"{who(places_of(broken))}: {broken[0].nccl_error}", "pip install '.[cuda13]'", places_of(broken),
    )]


def _judge_used(facts: Sequence[DeviceFacts]) -> list[Finding]:
    used = [each for each in facts if each.total_bytes - each.free_bytes > USED_SHARE * each.total_bytes]
    if not used:
        fewest = min(each.free_bytes for each in facts)
        return [green("GPU memory", f"{format_bytes(fewest)} free or more on each")]
    worst = min(used, key=lambda each: each.free_bytes)
    taken = f"{format_bytes(worst.total_bytes - worst.free_bytes)} of {format_bytes(worst.total_bytes)}"
    return [yellow(
        "GPU memory", f"{taken} in use before the start on {who(places_of(used))}",
        "nvidia-smi shows whose it is; ask Slurm for whole GPUs, or end what was left behind", places_of(used),
    )]


def _nccl_error() -> str:
    try:
        load_nccl()
    except ConfigError as error:
        return error.found
    return ""
