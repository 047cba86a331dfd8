"""A rank for test_launches: starts as a rank of `hpcinfer run` does, and says what the launcher, MPI and Slurm made of it.

    launch_rank.py run ...            a rank of `hpcinfer run ...`
    launch_rank.py [gpus] [ids=...]   a rank of its own, on a mesh of tp 2 x dp; it writes a line of JSON:
        gpus    also its GPU, which `comm.device` chooses from pretended ones: those of CUDA_VISIBLE_DEVICES
        ids=    also NCCL's ids of its communicators on a mesh of tp 2 x pp: from the "stand-in", or from CuPy's NCCL ("cupy")

`began_s` (seconds since the epoch) is when all modules were there: on a busy machine the import of torch takes the most time.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import types
from typing import Any

from hpcinfer.cli.main import main as hpcinfer_main
from hpcinfer.comm.bootstrap import World
from hpcinfer.comm.device import bind_device, torch
from hpcinfer.comm.nccl import NcclCommunicator
from hpcinfer.comm.nccl_library import load_nccl
from hpcinfer.launch.env import LaunchEnvironment
from hpcinfer.launch.report import Place, run_as_rank
from hpcinfer.parallel.groups import build_groups
from hpcinfer.parallel.mesh import Mesh
from hpcinfer.runner.start import enter_world
from tests.nccl_stand_in import use_stand_in

BEGAN_S = time.time()


def main(place: Place) -> int:
    environment = LaunchEnvironment.from_environ()
    world = enter_world(environment, place)
    mesh = Mesh.of(world.size, tp=2, rank=world.rank)
    facts = {
        "began_s": BEGAN_S, "started_as": environment.launcher_rank, "rank": world.rank, "node": os.environ["SLURMD_NODENAME"],
        "mesh": str(mesh), "tp": mesh.axis_ranks("tp"),
    }  # fmt: skip
    for argument in sys.argv[1:]:
        what, _, library = argument.partition("=")
        facts |= bound_gpu(world, environment) if what == "gpus" else {"ids": ids(world, library)}
    world.close()
    write_line(facts)
    return 0


def bound_gpu(world: World, environment: LaunchEnvironment) -> dict[str, Any]:
    """What `bind_device` does where CUDA has the GPUs that Slurm gave to this rank."""
    visible, bound = environment.visible_devices or (), []
    torch.version.cuda = "13.0"
    torch.cuda.device_count = lambda: len(visible)
    torch.cuda.set_device = bound.append
    # Without cgroups CUDA_VISIBLE_DEVICES has the node's own numbers, one for each GPU.
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(uuid=f"GPU-{visible[device.index]}")
    device = bind_device("cuda", world.channel, local_rank=world.local_rank, host=world.host)
    return {"visible": visible, "bound": [each.index for each in bound], "gpu": visible[device.index]}


class CupyIds:
    """`cupy.cuda.nccl` as far as it goes without a GPU: it makes ids. What would be made with them does nothing here."""

    def __init__(self) -> None:
        self.get_unique_id = load_nccl().get_unique_id

    def NcclCommunicator(self, ndev: int, unique_id: bytes, rank: int) -> Any:  # CuPy's name
        return types.SimpleNamespace(destroy=lambda: None, check_async_error=lambda: None)


def ids(world: World, library_name: str) -> list[dict[str, Any]]:
    """Name, id and this rank's place of each of its NCCL communicators. Collective."""
    library, made = use_stand_in(world), {}
    if library_name == "cupy":
        library = CupyIds()
    make = library.NcclCommunicator

    def make_and_note(ndev: int, unique_id: Any, rank: int) -> Any:
        comm = make(ndev, unique_id, rank)
        digest = hashlib.sha256(repr(unique_id).encode()).hexdigest()[:16]  # srun mixes what ranks write in lines over 1024 bytes
        made[id(comm)] = {"id": digest, "kind": type(unique_id).__name__, "place": rank, "size": ndev}
        return comm

    library.NcclCommunicator = make_and_note
    object.__setattr__(world.nccl, "library", library)  # frozen for everybody else
    groups = build_groups(world, Mesh.of(world.size, tp=2, pp=world.size // 2, rank=world.rank))
    found = [
        {"name": each.name, **made[id(each._comm)]} for each in groups.communicators() if isinstance(each, NcclCommunicator)
    ]
    groups.close()
    return found


def write_line(facts: dict[str, Any]) -> None:
    """One write, so that the lines of ranks do not mix."""
    sys.stdout.flush()
    os.write(1, (json.dumps(facts) + "\n").encode())


if __name__ == "__main__":
    exit_code = hpcinfer_main(sys.argv[1:]) if sys.argv[1:2] == ["run"] else run_as_rank(main)
    if exit_code:
        write_line({"began_s": BEGAN_S})
    sys.exit(exit_code)
