"""From the launcher's MPI world to communicators.

    world = start_world()                         # checks the launch, orders the ranks, starts the progress engine
    world.watch(on_failure)                       # heartbeats, and reports of what gets stuck
    world.use_device("auto")                      # a GPU where there are any; its tensors then travel over NCCL
    tp = split(world, mesh.axis_ranks("tp"), "tp")

A single process without MPI uses `local_world()`; everything above works on it unchanged.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hpcinfer.comm.communicator import Communicator
from hpcinfer.comm.device import CPU, bind_device
from hpcinfer.comm.device_queue import Reporting
from hpcinfer.comm.drain_notices import DrainNotices
from hpcinfer.comm.host import HostChannel, LocalHostChannel, MpiHostChannel
from hpcinfer.comm.local import LocalCommunicator
from hpcinfer.comm.mpi import DEADLINE_S, MpiCommunicator
from hpcinfer.comm.mpi_library import load_launched_mpi, load_mpi
from hpcinfer.comm.nccl import NcclCommunicator
from hpcinfer.comm.nccl_library import Nccl, apply_settings, check_versions, load_nccl
from hpcinfer.comm.operation import Mark
from hpcinfer.comm.progress import ProgressEngine
from hpcinfer.comm.streams import CudaStreams
from hpcinfer.comm.watchdog import Heart, Watchdog
from hpcinfer.errors import CommunicationError
from hpcinfer.launch.env import LaunchEnvironment
from hpcinfer.launch.signals import DrainFlag
from hpcinfer.launch.topology import order_ranks

STRICT_VARIABLE = "HPCINFER_COMM_STRICT"


@dataclasses.dataclass(kw_only=True)
class World:
    """All ranks of a run in mesh order, and what one rank needs to talk to the others."""

    mpi_comm: Any | None
    """mpi4py communicator in mesh order; None for a single process without MPI."""
    rank: int
    size: int
    host: str
    node_index: int
    """Number of this rank's node, 0 to num_nodes - 1."""
    num_nodes: int
    local_rank: int
    """Number of this rank on its node, 0 to local_size - 1."""
    local_size: int
    progress: ProgressEngine | None
    channel: HostChannel
    """Objects among all ranks of the world."""
    strict: bool = False
    """Communicators imitate NCCL's ordering (see `comm.mpi`)."""
    deadline_s: float = DEADLINE_S
    """Seconds that any wait may last."""
    device: torch.device = CPU
    """Where this rank computes."""
    num_device_ranks: int = 1
    """Ranks that share this rank's GPU."""
    watchdog: Watchdog | None = None
    """Finds what is stuck; None in a single process, and until `watch` was called."""
    notices: DrainNotices | None = None
    """Tells drain signals to the leader of this rank's replica."""
    nccl: Nccl | None = None
    """How tensors travel between GPUs; None where they are on the CPU or there is one rank."""
    nccl_settings: dict[str, str] = dataclasses.field(default_factory=dict)
    """NCCL's variables that are in force, its version under "version"."""

    def reporting(self) -> Reporting:
        """How what this rank does is named in reports, and who records it."""
        if self.progress is None:
            return Reporting(mark=Mark(), host=self.host)
        progress = self.progress
        return Reporting(
            mark=progress.mark, world_rank=self.rank, host=self.host, recorder=lambda: progress.recorder
        )

    def watch(self, on_failure: Callable[[CommunicationError], None], *, heartbeat_s: float = 0.0) -> None:
        """Look for what is stuck from now on. Collective.

        Args:
            on_failure: called on another thread with what was found.
            heartbeat_s: seconds between two heartbeats; 0 sends none.
        """
        if self.size == 1:
            return
        heart = None
        if heartbeat_s > 0:
            hosts = self.channel.all_gather(self.host)
            period_s = min(heartbeat_s, self.deadline_s / 4)
            heart = Heart(self.mpi_comm.Dup(), hosts=hosts, mark=self.progress.mark, period_s=period_s)
        self.watchdog = Watchdog(on_failure, deadline_s=self.deadline_s, heart=heart)

    def tell_drains(self, flag: DrainFlag, *, leader: int, ranks: Sequence[int]) -> None:
        """From now on drain signals to this rank's replica are noted in its leader's flag too. Collective, after `watch`.

        Args:
            flag: this rank's.
            leader: the replica's leader.
            ranks: the replica's ranks.
        """
        if self.size == 1:
            return
        followers = [rank for rank in ranks if rank != leader]
        self.notices = DrainNotices(self.mpi_comm.Dup(), leader=leader, followers=followers, flag=flag)
        self.watchdog.watch(self.notices)

    def forget_drains(self) -> None:
        """End that. Collective."""
        if self.notices is not None:
            self.watchdog.forget(self.notices)
            self.notices.close(self.deadline_s)
            self.notices = None

    def use_device(self, setting: str, *, share_gpu: bool = False) -> None:
        """Bind this rank to its device; on GPUs tensors travel over NCCL from now on. Collective, after `watch`.

        Args:
            setting: auto, cpu or cuda.
            share_gpu: several ranks may have one GPU (for tests).

        Raises:
            ConfigError: no GPU where one was asked for; no NCCL.
            LaunchError: two ranks have one GPU, or different versions of NCCL.
        """
        self.device = bind_device(
            setting, self.channel, local_rank=self.local_rank, host=self.host, share_gpu=share_gpu
        )
        if share_gpu and self.device.type == "cuda":
            self.num_device_ranks = -(-self.local_size // torch.cuda.device_count())
        if self.device.type == "cuda" and self.size > 1:
            self.nccl_settings = apply_settings(share_gpu_rank=self.rank if share_gpu else None)
            library = load_nccl()
            self.nccl_settings["version"] = check_versions(library, self.channel)
            self.nccl = Nccl(library=library, streams=CudaStreams(self.device), watchdog=self.watchdog)

    def first(self, num_ranks: int) -> World | None:
        """A world of the first `num_ranks` ranks; None on the others. Collective over this world.

        For tests that run several layouts in one process life.
        """
        if num_ranks == self.size:
            return self
        if not 1 <= num_ranks <= self.size:
            raise CommunicationError(
                f"a world of {num_ranks} ranks", found=f"{self.size} ranks", fix="start more ranks"
            )
        comm = _split(self, range(num_ranks) if self.rank < num_ranks else None)
        if self.rank >= num_ranks:
            return None
        if num_ranks == 1:
            return dataclasses.replace(
                self, mpi_comm=None, size=1, num_nodes=1, local_size=1, channel=LocalHostChannel("world")
            )
        order = order_ranks(comm)
        return dataclasses.replace(
            self, mpi_comm=order.mpi_comm, rank=order.rank, size=order.size, node_index=order.node_index,
            num_nodes=order.num_nodes, local_rank=order.local_rank, local_size=order.local_size,
            channel=_channel(order.mpi_comm, "world", self),
        )

    def abort(self, exit_code: int) -> None:
        """End all ranks of the run at once, whatever they are doing."""
        if self.mpi_comm is None:
            os._exit(exit_code)
        load_mpi().COMM_WORLD.Abort(exit_code)

    def close(self) -> None:
        """Release the world's channel and end its threads. Collective; close communicators before."""
        if self.watchdog is not None:
            self.watchdog.close()
        self.channel.close()
        if self.progress is not None:
            self.progress.close()


def start_world(
    *,
    environment: LaunchEnvironment | None = None,
    strict: bool | None = None,
    deadline_s: float = DEADLINE_S,
) -> World:
    """Initialise MPI, check that the world is what the launcher started, and order its ranks. Collective.

    Args:
        environment: of this process; read from os.environ by default.
        strict: make strict communicators; by default what the variable HPCINFER_COMM_STRICT says (1 is on).
        deadline_s: seconds that any wait may last.

    Raises:
        LaunchError: no MPI, too little thread support, or a world of one rank where the launcher started more.
    """
    MPI = load_launched_mpi(environment or LaunchEnvironment.from_environ())
    order = order_ranks(MPI.COMM_WORLD)
    progress = ProgressEngine(rank=order.rank, host=order.host, oversubscribed=order.local_size > order.node_cores)
    world = World(
        mpi_comm=order.mpi_comm, rank=order.rank, size=order.size, host=order.host, node_index=order.node_index,
        num_nodes=order.num_nodes, local_rank=order.local_rank, local_size=order.local_size, progress=progress,
        channel=LocalHostChannel("world"), deadline_s=deadline_s,
        strict=os.environ.get(STRICT_VARIABLE) == "1" if strict is None else strict,
    )
    if world.size > 1:
        world.channel = _channel(order.mpi_comm, "world", world)
    return world


def local_world() -> World:
    """The world of a single process. Needs no MPI."""
    return World(
        mpi_comm=None, rank=0, size=1, host=socket.gethostname(), node_index=0, num_nodes=1, local_rank=0, local_size=1,
        progress=None, channel=LocalHostChannel("world"),
    )


def split(world: World, ranks: Sequence[int] | None, name: str) -> Communicator | None:
    """A communicator of tensors on the world's device among `ranks`. Collective over the whole world.

    Args:
        world: of this run.
        ranks: world ranks that form this rank's communicator, in its order; every one of them passes the same list, and
            lists are disjoint. None where this rank is in no communicator of this call.
        name: for records and errors.

    Returns:
        A LocalCommunicator for one rank; for more a NcclCommunicator between GPUs, else a MpiCommunicator. None where
        `ranks` is None.
    """
    if world.nccl is not None:
        return _split_nccl(world, ranks, name)
    comm = _split(world, ranks)
    if ranks is None:
        return None
    if len(ranks) == 1:
        return LocalCommunicator(name, world.device)
    return MpiCommunicator(
        comm, name, progress=world.progress, strict=world.strict, deadline_s=world.deadline_s, world_ranks=tuple(ranks)
    )


def _split_nccl(world: World, ranks: Sequence[int] | None, name: str) -> Communicator | None:
    channel = split_channel(world, ranks, name)
    if ranks is None:
        return None
    if len(ranks) == 1:
        return LocalCommunicator(name, world.device)
    return NcclCommunicator(
        channel, name, device=world.device, nccl=world.nccl, reporting=world.reporting(), deadline_s=world.deadline_s,
        world_ranks=tuple(ranks),
    )


def split_channel(world: World, ranks: Sequence[int] | None, name: str) -> HostChannel | None:
    """A host channel among `ranks`; see `split`. Collective over the whole world."""
    comm = _split(world, ranks)
    if ranks is None:
        return None
    if len(ranks) == 1:
        return LocalHostChannel(name)
    return MpiHostChannel(
        comm, name, progress=world.progress, deadline_s=world.deadline_s, world_ranks=tuple(ranks)
    )


def _channel(comm: Any, name: str, world: World) -> HostChannel:
    return MpiHostChannel(
        comm.Dup(), name, progress=world.progress, deadline_s=world.deadline_s, world_ranks=range(comm.Get_size())
    )


def _split(world: World, ranks: Sequence[int] | None) -> Any | None:
    """A new mpi4py communicator among `ranks`, or None where that is one rank or none."""
    if ranks is not None and (world.rank not in ranks or not all(0 <= rank < world.size for rank in ranks)):
        raise CommunicationError(
            f"a communicator among ranks {list(ranks)}", found=f"rank {world.rank} of {world.size}",
            fix="list ranks of the world, this rank among them",
        )
    if world.mpi_comm is None:
        return None
    MPI = load_mpi()
    if ranks is None or len(ranks) == 1:
        world.mpi_comm.Split(MPI.UNDEFINED, 0)
        return None
    # Lists are disjoint, so that the smallest member tells them apart.
    return world.mpi_comm.Split(min(ranks), list(ranks).index(world.rank))
