"""The communicators of one rank: one for each axis and link of the mesh that it is on."""

from __future__ import annotations

import dataclasses

from hpcinfer.comm.bootstrap import World, split, split_channel
from hpcinfer.comm.communicator import Communicator
from hpcinfer.comm.device_queue import Reporting
from hpcinfer.comm.host import HostChannel
from hpcinfer.comm.mpi import DEADLINE_S
from hpcinfer.comm.operation import Mark
from hpcinfer.comm.watchdog import Watchdog
from hpcinfer.errors import ConfigError
from hpcinfer.parallel.axes import StageAxes
from hpcinfer.parallel.mesh import Mesh


@dataclasses.dataclass(kw_only=True)
class ReplicaGroups:
    """What one rank talks through inside its replica. Each communicator is independent of the others."""

    mesh: Mesh
    axes: StageAxes
    """Among the ranks of this stage: what its layers use."""
    from_previous: Communicator | None
    """Two ranks: 0 is this rank's neighbour in the previous stage, 1 is this rank. None on the first stage."""
    to_next: Communicator | None
    """Two ranks: 0 is this rank, 1 its neighbour in the next stage. None on the last stage."""
    tokens: dict[int, Communicator]
    """Lane -> the link on which its drawn tokens return. Two ranks each: 0 is the lane's sampler (last stage, tp rank 0), 1 the
    leader. On the leader every lane whose sampler is another rank, on such a sampler its own lane, empty on all others."""
    control: HostChannel
    """Objects among all ranks of the replica; rank 0 is the leader."""
    reporting: Reporting
    """How what this rank does is named in reports and records."""
    watchdog: Watchdog | None = None
    """Finds what is stuck on a device."""
    deadline_s: float = DEADLINE_S
    """Seconds that any wait may last."""

    @property
    def mark(self) -> Mark:
        """What this rank is working on: reports and records of transfers name it."""
        return self.reporting.mark

    def communicators(self) -> list[Communicator]:
        """Those that this rank has, each once, for summing counters and checks."""
        return [*self._axes(), *self._links()]

    def warmup(self) -> None:
        """Connect every communicator. Collective over the replica."""
        for communicator in self._axes():
            communicator.warmup()
        for link in self._links():
            link.warmup(link=True)

    def check(self) -> None:
        """Raise CommunicationError where something failed in the background."""
        for communicator in self.communicators():
            communicator.check()

    def wait_s(self) -> float:
        """Seconds that this rank spent blocked in communication so far."""
        return sum(c.counters.wait_s for c in self.communicators()) + self.control.counters.wait_s

    def close(self) -> None:
        """Release all of them. Collective over the replica; nothing may be in flight."""
        for communicator in self.communicators():
            communicator.close()
        self.control.close()

    def _axes(self) -> list[Communicator]:
        return [self.axes.tp, self.axes.sp, *([self.axes.ep] if self.axes.ep_spans_lanes else [])]

    def _links(self) -> list[Communicator]:
        """Of two ranks each, of which 0 sends to 1. In an order in which warming them one after the other cannot deadlock: the
        stages from first to last, then the tokens' way back, lane by lane."""
        pairs = [link for link in (self.from_previous, self.to_next) if link is not None]
        return [*pairs, *self.tokens.values()]


def build_groups(world: World, mesh: Mesh, *, sequence_form: bool = False) -> ReplicaGroups:
    """The groups of this rank. Collective over the whole world, all replicas included.

    Args:
        world: its size must be the mesh's.
        mesh: as this rank sees it (`mesh.rank` is `world.rank`).
        sequence_form: the residual stream lies in token shards on the tp ranks.

    Raises:
        ConfigError: mesh and world do not belong together.
    """
    if mesh.size != world.size or mesh.rank != world.rank:
        raise ConfigError(
            f"a mesh of {mesh.size} ranks ({mesh}) seen from rank {mesh.rank}",
            found=f"a world of {world.size} ranks, rank {world.rank}",
            fix="use Mesh.of(world.size, ..., rank=world.rank)",
        )
    axes = _stage_axes(world, mesh, sequence_form)
    # One split makes disjoint groups only, and a middle stage is on two links: even ones first, then odd ones.
    links = {}
    for parity in (0, 1):
        for step in (+1, -1):
            first = mesh.stage if step > 0 else mesh.stage - 1
            other = mesh.neighbour(step)
            if other is not None and first % 2 == parity:
                pair = [mesh.rank, other] if step > 0 else [other, mesh.rank]
                links[step] = split(world, pair, f"pp {first}>{first + 1}")
                break
        else:
            split(world, None, "pp")
    return ReplicaGroups(
        mesh=mesh, axes=axes, from_previous=links.get(-1), to_next=links.get(+1),
        tokens=_token_links(world, mesh), control=split_channel(world, mesh.replica_ranks(), "control"),
        reporting=world.reporting(), watchdog=world.watchdog, deadline_s=world.deadline_s,
    )


def _stage_axes(world: World, mesh: Mesh, sequence_form: bool) -> StageAxes:
    tp = split(world, mesh.axis_ranks("tp"), "tp")
    sp = split(world, mesh.axis_ranks("sp"), "sp")
    if mesh.ep == mesh.tp:
        ep = tp
    else:
        ep = split(world, mesh.stage_ranks() if mesh.ep > 1 else [mesh.rank], "ep")
    return StageAxes(tp=tp, sp=sp, ep=ep, sequence_form=sequence_form)


def _token_links(world: World, mesh: Mesh) -> dict[int, Communicator]:
    links = {}
    for lane in range(mesh.sp):
        ends = [mesh.rank_of(stage=mesh.pp - 1, lane=lane, tp_rank=0), mesh.leader]
        is_end = mesh.rank in ends and ends[0] != ends[1]
        link = split(world, ends if is_end else None, f"tokens {lane}" if mesh.sp > 1 else "tokens")
        if link is not None:
            links[lane] = link
    return links
