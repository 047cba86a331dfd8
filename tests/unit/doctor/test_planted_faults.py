"""Facts of a healthy machine are all green, and each planted fault is found: one red, at the right place, with a fix."""

from __future__ import annotations

import dataclasses
import errno

import pytest

from hpcinfer.config.load import job_from_tables
from hpcinfer.doctor.facts import Facts, judge
from hpcinfer.doctor.finding import Level
from hpcinfer.doctor.limits import UNLIMITED
from hpcinfer.errors import CheckpointError
from tests.doctor_facts import change, fabric, healthy_facts, judged, network, port, reds


def test_the_healthy_machine_is_green():
    findings = judged()
    assert {finding.level for finding in findings if finding.check != "quota"} == {Level.GREEN}
    assert len(findings) > 25 and not any(finding.fix for finding in findings)


def wrong_plugin(facts: Facts) -> None:
    facts.launch = [dataclasses.replace(each, world_size=1) for each in facts.launch]


def one_gpu_twice(facts: Facts) -> None:
    facts.devices = change(facts.devices, 3, uuid="gpu-2")


def missing_shard(facts: Facts) -> None:
    facts.model = dataclasses.replace(
        facts.model, error=CheckpointError("shards are missing", found="1 of 3: model-2.safetensors", fix="copy them again")
    )


def read_only(facts: Facts) -> None:
    for index in (2, 3):
        facts.storage = change(
            facts.storage, index, error="[Errno 30] Read-only file system", error_number=errno.EROFS, won=()
        )
    for index in (0, 1):  # the names go to the others
        facts.storage = change(facts.storage, index, won=tuple(range(index, 32, 2)))


def full_disk(facts: Facts) -> None:
    facts.space = dataclasses.replace(facts.space, free_bytes=10_000)


def slow_node(facts: Facts) -> None:
    facts.network = [network(rank, 4, out=1e9 if rank == 4 else 20e9) for rank in range(8)]


def skewed_version(facts: Facts) -> None:
    facts.versions = change(facts.versions, 2, versions={**facts.versions[2].versions, "NCCL": "2.27.3"})


def broken_exclusive(facts: Facts) -> None:
    facts.storage = change(facts.storage, 2, won=tuple(range(0, 32, 2)))


def few_files(facts: Facts) -> None:
    facts.limits = change(facts.limits, 2, files=64)


def no_room_for_kv(facts: Facts) -> None:
    facts.memory = change(facts.memory, 2, free_bytes=7 * 2**30)
    facts.job = job_from_tables({
        "model": {"path": "m"}, "data": {"prompts": "p", "output": "o"}, "parallel": {"tp": 2},
        "engine": {"max_context": 4096, "kv_memory": "1 GiB"},
    })


def port_down(facts: Facts) -> None:
    facts.fabric = [fabric(rank) if rank < 2 else broken_fabric(rank, state="DOWN", physical="Polling") for rank in range(4)]


def half_rate(facts: Facts) -> None:
    facts.fabric = [
        fabric(rank) if rank < 2 else broken_fabric(rank, rate_gbit=100.0, rate="100 Gb/sec (2X HDR)") for rank in range(4)
    ]


def wrong_numa_node(facts: Facts) -> None:
    facts.fabric = [fabric(rank) if rank < 2 else broken_fabric(rank, numa_node=1) for rank in range(4)]


def broken_fabric(rank: int, **changes):
    # Whether it is near to a GPU is another question (test_fabric).
    return fabric(rank, ports=(port("mlx5_0", **changes), port("mlx5_1")), gpu_numa_node=1)


def no_tokenizer(facts: Facts) -> None:
    facts.model = dataclasses.replace(facts.model, tokenizer_error=CheckpointError("/models/llama has no tokenizer.json"))


FAULTS = {
    wrong_plugin: ("MPI world", (), "srun --mpi=pmi2"),
    one_gpu_twice: ("GPUs", ("n1",), "--gpus-per-node"),
    missing_shard: ("model files", (), "copy them again"),
    read_only: ("output: write", ("n1",), "read-only"),
    full_disk: ("free space", (), "make room"),
    slow_node: ("links between nodes", ("n2",), "--exclude=n2"),
    skewed_version: ("versions: NCCL", ("n1",), "one environment on all nodes"),
    broken_exclusive: ("output: exclusive names", ("n0", "n1"), "file system"),
    few_files: ("file handles", ("n1",), "ulimit -n"),
    no_room_for_kv: ("weights and K/V", ("n1",), "give at most"),
    port_down: ("InfiniBand ports", ("n1",), "cable"),
    half_rate: ("InfiniBand rate", ("n1",), "cable"),
    wrong_numa_node: ("NIC placement", ("n1",), "slot"),
    no_tokenizer: ("tokenizer", (), "tokenizer.json"),
}


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_the_one_red(plant):
    check, where, fix = FAULTS[plant]
    found = reds(judged(plant))
    assert [(finding.check, finding.where) for finding in found] == [(check, where)], found
    assert fix in found[0].fix and found[0].found


def test_the_words_name_the_culprit():
    def text(plant):
        return reds(judged(plant))[0].found

    assert "ranks 2, 3 on host n1 have GPU gpu-2" in text(one_gpu_twice)
    assert "n2 sends at 1 GB/s; the median of 4 nodes is 20 GB/s" in text(slow_node)
    assert "NCCL 2.27.3 on rank 2 on n1, 2.28.9 on the other 3" in text(skewed_version)
    assert "O_EXCL: 8 of 32 names were given twice, one of them to rank 0 on n0; rank 2 on n1" in text(broken_exclusive)
    assert "rank 2 on n1: engine.kv_memory" in text(no_room_for_kv)
    assert "mlx5_0:1 is DOWN (Polling) on n1, ACTIVE on 1 other node" in text(port_down)
    assert "mlx5_0:1 runs at 100 Gb/sec (2X HDR) on n1, others at 200 Gb/sec" in text(half_rate)
    assert "mlx5_0:1 is on NUMA node 1 of n1, on 0 of 1 other node" in text(wrong_numa_node)
    assert "/scratch/run cannot be used by ranks 2-3 on n1: [Errno 30]" in text(read_only)
    assert "64 on rank 2 on n1; 4 ranks need 136 each" in text(few_files)


def test_what_was_not_gathered_is_not_judged():
    """Ranks that stop answering leave facts of the parts before."""
    facts = healthy_facts()
    whole = judge(facts)
    for name in ("network", "storage", "space", "model", "files", "memory", "limits", "clocks"):
        setattr(facts, name, None)
    rest = judge(facts)
    assert 0 < len(rest) < len(whole) and all(finding in whole for finding in rest)
    assert judge(Facts()) == []


def test_limits_that_matter_with_gpus_and_fabric():
    def plant(facts: Facts) -> None:
        facts.limits = change(facts.limits, 1, locked_bytes=65536, address_bytes=2**34, file_bytes=2**20)

    assert [finding.check for finding in reds(judged(plant))] == ["locked memory", "address space", "file size"]

    def without_either(facts: Facts) -> None:
        plant(facts)
        facts.limits = change(facts.limits, 1, file_bytes=UNLIMITED)
        facts.devices = [dataclasses.replace(each, num_visible=0, driver="") for each in facts.devices]
        facts.fabric = [dataclasses.replace(each, ports=()) for each in facts.fabric]

    assert not reds(judged(without_either))


def test_absent_things_are_not_here():
    def plant(facts: Facts) -> None:
        facts.devices = [dataclasses.replace(each, num_visible=0, driver="", visible_devices=None) for each in facts.devices]
        facts.fabric = [dataclasses.replace(each, ports=(), gpu_numa_node=None) for each in facts.fabric]
        facts.memory = [dataclasses.replace(each, device_type="cpu") for each in facts.memory]

    levels = {finding.check: finding.level for finding in judged(plant)}
    assert Level.RED not in levels.values() and Level.YELLOW not in levels.values()
    assert levels["GPUs"] is levels["InfiniBand"] is levels["locked memory"] is Level.ABSENT
