"""Made-up facts of a healthy machine to plant faults in: two nodes, each of two ranks, two GPUs and two InfiniBand cards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hpcinfer.config.load import job_from_tables
from hpcinfer.config.model import ModelConfig
from hpcinfer.doctor.devices import DeviceFacts
from hpcinfer.doctor.fabric import FabricFacts
from hpcinfer.doctor.facts import Facts, judge
from hpcinfer.doctor.file_probe import NUM_NAMES, StorageFacts
from hpcinfer.doctor.finding import Finding, Level, RankPlace
from hpcinfer.doctor.launch import LaunchFacts
from hpcinfer.doctor.limits import ClockFacts, LimitFacts
from hpcinfer.doctor.memory import MemoryFacts
from hpcinfer.doctor.model import FileFacts, ModelFacts
from hpcinfer.doctor.network import NetworkFacts
from hpcinfer.doctor.ports import Port
from hpcinfer.doctor.probes import PairFigures, ReduceFigures
from hpcinfer.doctor.space import SpaceFacts, Writes
from hpcinfer.doctor.versions import VersionFacts

GIB = 2**30
MODEL = ModelConfig(
    family="LlamaForCausalLM", vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_layers=32, num_heads=32,
    num_kv_heads=32, head_dim=128, max_position_embeddings=4096, dtype="bfloat16",
)
SIZES = {"config.json": 700, "model.safetensors": 13 * GIB, "tokenizer.json": 2_000_000}


def place(rank: int, *, ranks_a_node: int = 2) -> RankPlace:
    """Rank `rank` of nodes n0, n1, ..."""
    node, local_rank = divmod(rank, ranks_a_node)
    return RankPlace(rank=rank, host=f"n{node}", node=node, local_rank=local_rank)


def port(device: str, **changes: Any) -> Port:
    """A port that is up at 200 Gb/s; mlx5_0 is on NUMA node 0, mlx5_1 on 1."""
    healthy = Port(
        device=device, port="1", state="ACTIVE", physical="LinkUp", rate_gbit=200.0, rate="200 Gb/sec (4X HDR)",
        link_layer="InfiniBand", numa_node=int(device[-1]),
    )
    return dataclasses.replace(healthy, **changes)


def fabric(rank: int, **changes: Any) -> FabricFacts:
    """Two ports; the GPU of local rank 0 is on NUMA node 0, that of 1 on 1."""
    healthy = FabricFacts(
        place=place(rank), ports=(port("mlx5_0"), port("mlx5_1")), peer_module=True, gpu_numa_node=rank % 2
    )
    return dataclasses.replace(healthy, **changes)


def network(rank: int, num_nodes: int = 2, *, out: float = 20e9, latency_s: float = 3e-6) -> NetworkFacts:
    """`out`: bytes per second that the node sends, if it is the first rank there."""
    here = place(rank)
    inside = ReduceFigures(num_ranks=2, latency_s=2e-6, bytes_per_s=200e9)
    facts = NetworkFacts(place=here, transport="NCCL", inside=inside)
    if here.local_rank:
        return facts
    pairs = [PairFigures(peer=peer, latency_s=latency_s, bytes_per_s=out) for peer in range(num_nodes) if peer != here.node]
    return dataclasses.replace(
        facts, inside_pairs=(PairFigures(peer=1, latency_s=1e-6, bytes_per_s=300e9),),
        between=ReduceFigures(num_ranks=num_nodes, latency_s=5e-6, bytes_per_s=18e9), between_pairs=tuple(pairs),
    )


def storage(rank: int, num_ranks: int = 4, **changes: Any) -> StorageFacts:
    """Every name went to the rank of its number modulo the ranks."""
    healthy = StorageFacts(
        place=place(rank), folder="/scratch/run", commit_s=0.005, write_bytes_per_s=1e9, read_bytes_per_s=2e9,
        won=tuple(range(rank, NUM_NAMES, num_ranks)),
    )
    return dataclasses.replace(healthy, **changes)


def healthy_facts() -> Facts:
    """Of four ranks; a job with tp 2."""
    ranks = range(4)
    places = [place(rank) for rank in ranks]
    job = job_from_tables({
        "model": {"path": "/models/llama"}, "data": {"prompts": "/data/p.h5", "output": "/scratch/run"},
        "parallel": {"tp": 2},
    })
    versions = {"hpcinfer": "0.1.0", "torch": "2.11.0", "NCCL": "2.28.9", "cupy": "14.2", "kernel": "6.1"}
    return Facts(
        places=places, job=job, job_path="job.toml",
        launch=[
            LaunchFacts(
                place=each, launcher="srun", expected_ranks=4, world_size=4, mpi="MPICH 5.0.2", flavour="pmi2",
                cores=frozenset(range(8 * each.local_rank, 8 * each.local_rank + 8)), machine_cores=16, threads=8,
            ) for each in places
        ],
        versions=[VersionFacts(place=each, versions=dict(versions)) for each in places],
        devices=[
            DeviceFacts(
                place=each, num_visible=2, uuid=f"gpu-{each.rank}", name="H100", total_bytes=80 * GIB, free_bytes=79 * GIB,
                pci=f"0000:{each.local_rank}b:00.0", torch_build="torch 2.11.0 for CUDA 13.0", driver="580.1",
            ) for each in places
        ],
        fabric=[fabric(rank) for rank in ranks],
        network=[network(rank) for rank in ranks],
        storage=[storage(rank) for rank in ranks],
        space=SpaceFacts(folder="/scratch/run", free_bytes=1000 * GIB, free_files=10_000_000),
        writes=Writes(likely_bytes=2 * GIB, most_bytes=4 * GIB),
        model=ModelFacts(path="/models/llama", model=MODEL, prompts_kind="text", num_rows=1000),
        files=[FileFacts(place=each, sizes=dict(SIZES), read_bytes_per_s=2e9) for each in places if not each.local_rank],
        memory=[MemoryFacts(place=each, free_bytes=79 * GIB, device_type="cuda") for each in places],
        limits=[LimitFacts(place=each, files=65536, most_files=524288, shared_free_bytes=64 * GIB) for each in places],
        clocks=[ClockFacts(place=each, ahead_s=1e-4 * each.rank, error_s=1e-5) for each in places],
    )


def change(facts: Sequence, index: int, **changes: Any) -> list:
    """The facts of all ranks, those of one changed."""
    return [dataclasses.replace(each, **changes) if i == index else each for i, each in enumerate(facts)]


def judged(plant: Callable[[Facts], None] = lambda facts: None) -> list[Finding]:
    """What healthy facts with a fault in them come to."""
    facts = healthy_facts()
    plant(facts)
    return judge(facts)


def reds(findings: Sequence[Finding]) -> list[Finding]:
    """The red ones."""
    return [finding for finding in findings if finding.level is Level.RED]


def plant_ports(root: Path, ports: dict[str, dict[str, str]]) -> Path:
    """Make a tree like /sys with InfiniBand devices and return `root`. `ports`: device -> files unlike a healthy port's."""
    for device, changes in ports.items():
        files = {
            "state": "4: ACTIVE", "phys_state": "5: LinkUp", "rate": "200 Gb/sec (4X HDR)", "link_layer": "InfiniBand",
            "numa_node": device[-1], "current_link_width": "16", "max_link_width": "16",
            "current_link_speed": "16.0 GT/s PCIe", "max_link_speed": "16.0 GT/s PCIe", **changes,
        }
        for name, text in files.items():
            of_port = name in ("state", "phys_state", "rate", "link_layer")
            folder = root / "class/infiniband" / device / ("ports/1" if of_port else "device")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text + "\n")
    return root
