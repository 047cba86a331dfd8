"""InfiniBand: ports up, at their full rate, near the GPUs; GPUDirect.

A port is judged by the same port of the other nodes first: what a site has everywhere is its design, what one node alone has
is a fault.
"""

from __future__ import annotations

import collections
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

from hpcinfer.doctor.finding import Finding, RankPlace, absent, green, host_names, hosts, red, who, yellow
from hpcinfer.doctor.ports import SYS, Port, pci_numa_node, read_ports

PEER_MODULES = ("nvidia_peermem", "nv_peer_mem")
"""Kernel modules through which a NIC reads a GPU's memory."""
_Members = list[tuple["FabricFacts", Port]]
"""A port of one name on every node that has it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FabricFacts:
    """What one rank sees of its node."""

    place: RankPlace
    ports: tuple[Port, ...]
    peer_module: bool
    """A NIC can read GPU memory through a module of PEER_MODULES."""
    gpu_numa_node: int | None = None
    """Of this rank's GPU; None where there is none, or nobody knows."""


def gather_fabric(place: RankPlace, *, gpu_pci: str, sys_root: Path = SYS) -> FabricFacts:
    """This rank's own.

    Args:
        gpu_pci: address of its GPU, "" for none.
        sys_root: root of /sys.
    """
    return FabricFacts(
        place=place, ports=read_ports(sys_root), gpu_numa_node=pci_numa_node(gpu_pci, sys_root),
        peer_module=any((sys_root / "module" / name).is_dir() for name in PEER_MODULES),
    )


def fastest_bytes_per_s(facts: Sequence[FabricFacts]) -> float:
    """Of the ports that are up; 0 without any."""
    return max((port.rate_gbit * 1e9 / 8 for each in facts for port in each.ports if port.is_up), default=0.0)


def judge_fabric(facts: Sequence[FabricFacts]) -> list[Finding]:
    """Ports of all nodes, and how they lie to the GPUs. `facts`: of all ranks, in rank order."""
    nodes = list({each.place.node: each for each in reversed(facts)}.values())[::-1]
    if not any(each.ports for each in nodes):
        return [absent("InfiniBand", "no InfiniBand device")]
    same: dict[str, _Members] = collections.defaultdict(list)
    for node in nodes:
        for port in node.ports:
            same[port.name].append((node, port))
    findings = []
    for name, members in same.items():
        findings += [*_missing(name, members, nodes), *_down(name, members), *_slow(name, members)]
        findings += _misplaced(name, members)
    if not any(finding.check == "InfiniBand rate" for finding in findings):
        findings += _slower_than_its_neighbour(same)
    findings += _narrow_slots(nodes)
    if not findings:
        up = [port for port in nodes[0].ports if port.is_up]
        findings.append(green("InfiniBand", f"on every node {', '.join(f'{port.name} {port.rate}' for port in up)}"))
    return [*findings, *_near_gpus(facts)]


def _missing(name: str, members: _Members, nodes: list[FabricFacts]) -> list[Finding]:
    having = {node.place.node for node, _ in members}
    without = [node.place for node in nodes if node.place.node not in having]
    if not without or len(members) < len(without):
        return []
    return [red(
        "InfiniBand ports", f"no {name} on {host_names(without)}; there is one on {_count(len(members), 'other node')}",
        f"have the card and its driver looked at (lspci, dmesg); {_leave_out(without)}", without,
    )]


def _down(name: str, members: _Members) -> list[Finding]:
    """Red where the same port is up elsewhere, or no port of the node is up; yellow for one that is down everywhere."""
    down = [(node, port) for node, port in members if not port.is_up]
    if not down:
        return []
    places = [node.place for node, _ in down]
    num_up = len(members) - len(down)
    found = f"{name} is {down[0][1].state} ({down[0][1].physical}) on {host_names(places)}"
    if num_up or any(not any(port.is_up for port in node.ports) for node, _ in down):
        found += f", ACTIVE on {_count(num_up, 'other node')}" if num_up else ", and no port there is up"
        fix = f"have cable, switch port and subnet manager looked at (ibstat, ibdiagnet); {_leave_out(places)}"
        return [red("InfiniBand ports", found, fix, places)]
    fix = f"a port without a cable: keep NCCL and UCX off it (NCCL_IB_HCA=^{name}, UCX_NET_DEVICES with the others)"
    return [yellow("InfiniBand ports", found, fix, places)]


def _slow(name: str, members: _Members) -> list[Finding]:
    rates = [port.rate_gbit for _, port in members if port.is_up]
    usual = statistics.median_high(rates) if rates else 0.0
    slow = [(node, port) for node, port in members if port.is_up and port.rate_gbit < usual]
    if not slow:
        return []
    places = [node.place for node, _ in slow]
    return [red(
        "InfiniBand rate", f"{name} runs at {slow[0][1].rate} on {host_names(places)}, others at {usual:g} Gb/sec",
        f"have the cable reseated or changed (ibdiagnet finds the bad one); {_leave_out(places)}", places,
    )]


def _slower_than_its_neighbour(same: dict[str, _Members]) -> list[Finding]:
    """Ports of one kind that are slower than others of their node, everywhere alike: perhaps the site's design."""
    members = [(node, port) for each in same.values() for node, port in each if port.is_up]
    for layer in ("InfiniBand", "Ethernet"):
        alike = [(node, port) for node, port in members if port.link_layer == layer]
        fastest = max((port.rate_gbit for _, port in alike), default=0.0)
        slow = [(node, port) for node, port in alike if port.rate_gbit < fastest]
        if slow:
            names = sorted({port.name for _, port in slow})
            return [yellow(
                "InfiniBand rate", f"{', '.join(names)} at {slow[0][1].rate}, others at {fastest:g} Gb/sec",
                "if that is not the site's design (a port for storage), have the cable looked at; NCCL_IB_HCA takes the fast",
                [node.place for node, _ in slow],
            )]
    return []


def _narrow_slots(nodes: list[FabricFacts]) -> list[Finding]:
    narrow = [(node.place, port) for node in nodes for port in node.ports if port.is_up and port.slot]
    if not narrow:
        return []
    places = [place for place, _ in narrow]
    port = narrow[0][1]
    return [yellow(
        "InfiniBand slots", f"{port.device} on {host_names(places)} has {port.slot}",
        "have the card put into a full slot, or its link trained again by a cold start", places,
    )]


def _misplaced(name: str, members: _Members) -> list[Finding]:
    """A card that lies elsewhere than in most nodes."""
    known = [(node, port) for node, port in members if port.numa_node is not None]
    counts = collections.Counter(port.numa_node for _, port in known)
    if len(counts) < 2:
        return []
    usual, number = counts.most_common(1)[0]
    odd = [(node, port) for node, port in known if port.numa_node != usual]
    places = [node.place for node, _ in odd]
    return [red(
        "NIC placement",
        f"{name} is on NUMA node {odd[0][1].numa_node} of {host_names(places)}, on {usual} of {_count(number, 'other node')}",
        f"have the card put into the slot that the others have it in; {_leave_out(places)}", places,
    )]


def _near_gpus(facts: Sequence[FabricFacts]) -> list[Finding]:
    """GPUDirect, and whether every GPU has a NIC on its side of the machine."""
    with_gpu = [each for each in facts if each.gpu_numa_node is not None]
    if not with_gpu:
        return [absent("GPUDirect", "no GPU beside the InfiniBand devices, or the kernel does not know where it is")]
    without = [each.place for each in with_gpu if not each.peer_module]
    direct = green("GPUDirect", "its kernel module is loaded") if not without else yellow(
        "GPUDirect", f"neither of the modules {', '.join(PEER_MODULES)} on {host_names(without)}",
        "modprobe nvidia_peermem as root; without it NCCL needs dma-buf (Linux 5.12, the open driver) or copies through the "
        "host: NCCL_DEBUG=INFO says GDRDMA where data goes straight", without,
    )
    far = [
        each for each in with_gpu
        if (near := {port.numa_node for port in each.ports if port.is_up} - {None}) and each.gpu_numa_node not in near
    ]
    if not far:
        return [direct, green("NIC placement", "every GPU has a NIC on its own NUMA node")]
    places = [each.place for each in far]
    up = [f"{port.name} on {port.numa_node}" for port in far[0].ports if port.is_up]
    # One card cannot be near to all GPUs; several that all lie elsewhere are in the wrong slots.
    make = yellow if len(up) < 2 else red
    return [direct, make(
        "NIC placement", f"no NIC on NUMA node {far[0].gpu_numa_node} of the GPU of {who(places)}: {', '.join(up)}",
        "put NICs and GPUs on the same side (slots, BIOS), or give ranks that talk between nodes the GPUs that have one "
        "(--gpu-bind, NCCL_IB_HCA)", places,
    )]


def _leave_out(places: Sequence[RankPlace]) -> str:
    return f"leave it out until then: sbatch --exclude={','.join(hosts(places))}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"
