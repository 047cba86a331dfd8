"""The ports of InfiniBand and RoCE devices, as the kernel describes them under /sys. Nothing is sent."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

SYS = Path("/sys")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Port:
    """A port of an InfiniBand or RoCE device."""

    device: str
    port: str
    state: str
    """ACTIVE when it carries data; DOWN, INIT, ARMED."""
    physical: str
    """LinkUp; Polling without a partner at the other end, Disabled, Sleep."""
    rate_gbit: float
    rate: str
    """As the kernel has it: "200 Gb/sec (4X HDR)"."""
    link_layer: str
    """InfiniBand or Ethernet (RoCE)."""
    numa_node: int | None
    """None where the kernel does not know (-1, virtual machines)."""
    slot: str = ""
    """Where its PCIe slot is narrower or slower than the card: what it is and what it could be."""

    @property
    def name(self) -> str:
        return f"{self.device}:{self.port}"

    @property
    def is_up(self) -> bool:
        return self.state == "ACTIVE"


def read_ports(sys_root: Path = SYS) -> tuple[Port, ...]:
    """All ports of /sys/class/infiniband, by device and number. `sys_root`: root of /sys."""
    ports = []
    for folder in sorted((sys_root / "class/infiniband").glob("*/ports/*")):
        device = folder.parent.parent
        rate = _text(folder / "rate")
        number = re.match(r"[\d.]+", rate)
        ports.append(Port(
            device=device.name, port=folder.name, rate=rate, rate_gbit=float(number.group()) if number else 0.0,
            state=_after_colon(_text(folder / "state")), physical=_after_colon(_text(folder / "phys_state")),
            link_layer=_text(folder / "link_layer") or "InfiniBand", numa_node=read_numa_node(device / "device"),
            slot=_narrow_slot(device / "device"),
        ))
    return tuple(ports)


def pci_numa_node(address: str, sys_root: Path = SYS) -> int | None:
    """NUMA node of a PCI device; None where the kernel does not know, and for the address ""."""
    return read_numa_node(sys_root / "bus/pci/devices" / address) if address else None


def read_numa_node(device: Path) -> int | None:
    """NUMA node of a device by its folder; None where the kernel does not know."""
    text = _text(device / "numa_node")
    return int(text) if text.isdigit() else None


def _narrow_slot(device: Path) -> str:
    """What the kernel says where a card runs below its own speed or width."""
    for what in ("width", "speed"):
        now, most = _text(device / f"current_link_{what}"), _text(device / f"max_link_{what}")
        first, second = re.match(r"[\d.]+", now), re.match(r"[\d.]+", most)
        if not first or not second or {float(first.group()), float(second.group())} & {0.0, 255.0}:  # the kernel's "unknown"
            continue
        if float(first.group()) < float(second.group()):
            return f"PCIe {what} {now} of {most}"
    return ""


def _after_colon(text: str) -> str:
    """"4: ACTIVE" -> "ACTIVE"."""
    return text.rpartition(":")[2].strip() or "unknown"


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
