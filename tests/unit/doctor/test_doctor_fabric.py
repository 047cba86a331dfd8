"""InfiniBand from planted /sys trees."""

from __future__ import annotations

import pytest

from hpcinfer.doctor.fabric import fastest_bytes_per_s, gather_fabric, judge_fabric
from hpcinfer.doctor.finding import Level
from hpcinfer.doctor.ports import pci_numa_node, read_ports
from tests.doctor_facts import fabric, place, plant_ports, port

TWO = {"mlx5_0": {}, "mlx5_1": {}}


def node_of(tmp_path, rank, ports):
    return gather_fabric(place(rank), gpu_pci="", sys_root=plant_ports(tmp_path / f"sys{rank}", ports))


def troubles(facts):
    found = judge_fabric(facts)
    return [(finding.check, str(finding.level)) for finding in found if finding.level in (Level.RED, Level.YELLOW)]


def test_a_tree_is_read(tmp_path):
    down = {"state": "1: DOWN", "phys_state": "3: Disabled"}
    ports = read_ports(plant_ports(tmp_path, {"mlx5_1": {"numa_node": "-1"}, "mlx5_0": down}))
    assert ports == (port("mlx5_0", state="DOWN", physical="Disabled"), port("mlx5_1", numa_node=None))
    assert read_ports(tmp_path / "nothing") == ()


def test_the_kernel_module_and_the_gpu(tmp_path):
    root = plant_ports(tmp_path, TWO)
    (root / "bus/pci/devices/0000:1b:00.0").mkdir(parents=True)
    (root / "bus/pci/devices/0000:1b:00.0/numa_node").write_text("1\n")
    facts = gather_fabric(place(0), gpu_pci="0000:1b:00.0", sys_root=root)
    assert facts.gpu_numa_node == 1 and not facts.peer_module
    (root / "module/nvidia_peermem").mkdir(parents=True)
    assert gather_fabric(place(0), gpu_pci="", sys_root=root).peer_module
    assert pci_numa_node("", root) is None and pci_numa_node("0000:ff:00.0", root) is None


def test_two_healthy_nodes(tmp_path):
    facts = [node_of(tmp_path, rank, TWO) for rank in (0, 2)]
    findings = judge_fabric(facts)
    assert [str(finding.level) for finding in findings] == ["green", "not here"]
    assert "mlx5_0:1 200 Gb/sec (4X HDR)" in findings[0].found
    assert fastest_bytes_per_s(facts) == 25e9 and fastest_bytes_per_s([]) == 0


FAULTS = {
    "port down": ({"state": "1: DOWN", "phys_state": "2: Polling"}, "InfiniBand ports"),
    "half rate": ({"rate": "100 Gb/sec (2X HDR)"}, "InfiniBand rate"),
    "wrong NUMA node": ({"numa_node": "1"}, "NIC placement"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_of_two_nodes(tmp_path, fault):
    files, check = FAULTS[fault]
    facts = [node_of(tmp_path, 0, TWO), node_of(tmp_path, 2, {**TWO, "mlx5_0": files})]
    assert troubles(facts) == [(check, "red")]
    finding = next(finding for finding in judge_fabric(facts) if finding.check == check)
    assert finding.where == ("n1",) and finding.fix and "mlx5_0:1" in finding.found


def test_one_node_alone(tmp_path):
    """Nothing to compare with but its other port: what may be the site's design is yellow."""
    down, slow = FAULTS["port down"][0], FAULTS["half rate"][0]
    assert troubles([node_of(tmp_path / "a", 0, {**TWO, "mlx5_0": down})]) == [("InfiniBand ports", "yellow")]
    assert troubles([node_of(tmp_path / "b", 0, {"mlx5_0": down})]) == [("InfiniBand ports", "red")]
    assert troubles([node_of(tmp_path / "c", 0, {**TWO, "mlx5_0": slow})]) == [("InfiniBand rate", "yellow")]
    ethernet = {**slow, "link_layer": "Ethernet"}
    assert troubles([node_of(tmp_path / "d", 0, {**TWO, "mlx5_0": ethernet})]) == [], "another kind of network"


def test_a_port_that_is_down_everywhere_is_the_sites_design(tmp_path):
    facts = [node_of(tmp_path, rank, {**TWO, "mlx5_1": {"state": "1: DOWN"}}) for rank in (0, 2)]
    assert troubles(facts) == [("InfiniBand ports", "yellow")]


def test_a_card_that_is_gone(tmp_path):
    facts = [node_of(tmp_path, 0, TWO), node_of(tmp_path, 2, {"mlx5_0": {}})]
    assert troubles(facts) == [("InfiniBand ports", "red")]
    assert "no mlx5_1:1 on n1" in judge_fabric(facts)[0].found


def test_a_narrow_slot(tmp_path):
    facts = [node_of(tmp_path, 0, {"mlx5_0": {"current_link_width": "8"}})]
    assert troubles(facts) == [("InfiniBand slots", "yellow")]
    assert "PCIe width 8 of 16" in judge_fabric(facts)[0].found
    for current, most in (("0", "63"), ("16", "255")):  # of virtual machines: not known
        facts = [node_of(tmp_path, int(most), {"mlx5_0": {"current_link_width": current, "max_link_width": most}})]
        assert "PCIe width" not in judge_fabric(facts)[0].found
    facts = [node_of(tmp_path / "other", 0, {"mlx5_0": {"current_link_speed": "8.0 GT/s PCIe"}})]
    assert "PCIe speed 8.0 GT/s PCIe of 16.0 GT/s PCIe" in judge_fabric(facts)[0].found


def test_gpus_without_a_nic_on_their_side():
    # One card for two GPUs cannot be near to both; two cards on one side are in wrong slots.
    one = [fabric(rank, ports=(port("mlx5_0"),)) for rank in (0, 1)]
    assert troubles(one) == [("NIC placement", "yellow")]
    both = [fabric(rank, ports=(port("mlx5_0"), port("mlx5_1", numa_node=0))) for rank in (0, 1)]
    assert troubles(both) == [("NIC placement", "red")]
    assert "NUMA node 1 of the GPU of rank 1 on n0" in judge_fabric(both)[-1].found
    unknown = [fabric(rank, ports=(port("mlx5_0", numa_node=None),)) for rank in (0, 1)]
    assert troubles(unknown) == []


def test_gpudirect_without_its_module():
    facts = [fabric(0), fabric(1, peer_module=False)]
    assert troubles(facts) == [("GPUDirect", "yellow")]
