"""The mesh: which rank is which replica, stage, lane and tensor-parallel rank. Plain arithmetic, no communication.

Ranks are sorted by (node, local rank) (`launch.topology`). tp is innermost, so that its ranks, which talk most, share a
node; then sp, then pp; dp is outermost:

    rank = ((replica * pp + stage) * sp + lane) * tp + tp_rank
"""

from __future__ import annotations

import dataclasses

from hpcinfer.config.parallel import check_ep
from hpcinfer.errors import ConfigError

AXES = ("dp", "pp", "sp", "tp")
"""Outermost first."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """Sizes of the axes and the rank that looks at them."""

    dp: int = 1
    """Replicas: independent model instances."""
    pp: int = 1
    """Stages: parts of the layer stack."""
    sp: int = 1
    """Lanes: a prompt's tokens are split over them in prefill."""
    tp: int = 1
    """Ranks over which each weight is split."""
    ep: int = 1
    """Ranks of a stage over which experts are spread: 1, tp or sp * tp."""
    rank: int = 0
    """World rank, 0 to size - 1."""

    def __post_init__(self) -> None:
        for axis in (*AXES, "ep"):
            if (size := getattr(self, axis)) < 1:
                raise ConfigError(f"parallel.{axis} = {size}", fix=f"{axis} must be at least 1")
        check_ep(self.ep, sp=self.sp, tp=self.tp)
        if not 0 <= self.rank < self.size:
            raise ConfigError(f"rank {self.rank} of a mesh of {self.size} ranks", found=str(self))

    @classmethod
    def of(
        cls, world_size: int, *,
        pp: int = 1, sp: int = 1, tp: int = 1, ep: int = 1, dp: int | None = None, rank: int = 0,
    ) -> Mesh:
        """The mesh of `world_size` ranks; dp is world_size / (pp * sp * tp) unless it is given.

        Raises:
            ConfigError: the sizes do not multiply to the number of ranks; the message has the nearest that do.
        """
        for axis, size in (("pp", pp), ("sp", sp), ("tp", tp), ("dp", 1 if dp is None else dp)):
            if size < 1:
                raise ConfigError(f"parallel.{axis} = {size}", fix=f"{axis} must be at least 1")
        replica = pp * sp * tp
        asked = f"pp {pp} x sp {sp} x tp {tp}"
        if dp is None and world_size % replica:
            below, above = world_size // replica * replica, (world_size // replica + 1) * replica
            counts = f"{below} or {above}" if below else str(above)
            raise ConfigError(
                f"a replica of {asked} needs {replica} ranks, and ranks must be a multiple of that",
                found=f"{world_size} ranks",
                fix=f"start {counts} ranks, or set tp={_nearest_tp(world_size, pp * sp, tp)}"
                if world_size % (pp * sp) == 0
                else f"start {counts} ranks, or choose sizes whose product divides {world_size}",
            )
        if dp is not None and dp * replica != world_size:
            fix = f"start {dp * replica} ranks"
            if world_size % replica == 0:
                fix += f", or set dp={world_size // replica} (or leave it out)"
            raise ConfigError(
                f"dp {dp} x {asked} needs {dp * replica} ranks", found=f"{world_size} ranks", fix=fix
            )
        return cls(dp=world_size // replica, pp=pp, sp=sp, tp=tp, ep=ep, rank=rank)

    @property
    def size(self) -> int:
        """Ranks of the mesh."""
        return self.dp * self.pp * self.sp * self.tp

    @property
    def replica(self) -> int:
        """Which replica this rank belongs to, 0 to dp - 1."""
        return self.rank // (self.tp * self.sp * self.pp)

    @property
    def stage(self) -> int:
        """Which stage, 0 to pp - 1."""
        return self.rank // (self.tp * self.sp) % self.pp

    @property
    def lane(self) -> int:
        """Which lane, 0 to sp - 1."""
        return self.rank // self.tp % self.sp

    @property
    def tp_rank(self) -> int:
        """Which shard of every split weight, 0 to tp - 1."""
        return self.rank % self.tp

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.pp - 1

    @property
    def leader(self) -> int:
        """World rank of this replica's leader: stage 0, lane 0, tp rank 0. It runs what only one rank may do."""
        return self.rank_of(stage=0, lane=0, tp_rank=0)

    @property
    def is_leader(self) -> bool:
        return self.rank == self.leader

    @property
    def sampler(self) -> int:
        """World rank that samples for this rank's lane: the last stage's tp rank 0."""
        return self.rank_of(stage=self.pp - 1, tp_rank=0)

    @property
    def is_sampler(self) -> bool:
        return self.rank == self.sampler

    def index(self, axis: str) -> int:
        """This rank's coordinate on "dp", "pp", "sp" or "tp"."""
        return self._coordinates()[self._axis(axis)]

    def rank_of(
        self, *,
        replica: int | None = None, stage: int | None = None, lane: int | None = None, tp_rank: int | None = None,
    ) -> int:
        """World rank at these coordinates; those left out are this rank's own."""
        given = (replica, stage, lane, tp_rank)
        rank = 0
        for axis, own, value in zip(AXES, self._coordinates(), given, strict=True):
            value = own if value is None else value
            size = getattr(self, axis)
            if not 0 <= value < size:
                raise ConfigError(f"coordinate {value} on {axis}", found=f"{axis} has {size}")
            rank = rank * size + value
        return rank

    def axis_ranks(self, axis: str) -> list[int]:
        """World ranks that differ from this one on `axis` alone, in the order of that axis, this one included."""
        position = self._axis(axis)
        names = ("replica", "stage", "lane", "tp_rank")
        return [self.rank_of(**{names[position]: index}) for index in range(getattr(self, axis))]

    def replica_ranks(self) -> list[int]:
        """World ranks of this replica, the leader first."""
        size = self.pp * self.sp * self.tp
        return list(range(self.replica * size, (self.replica + 1) * size))

    def stage_ranks(self) -> list[int]:
        """World ranks of this replica's stage: all its lanes and tp ranks."""
        size = self.sp * self.tp
        first = self.rank // size * size
        return list(range(first, first + size))

    def neighbour(self, step: int) -> int | None:
        """World rank of the same lane and tp rank `step` stages further (+1 next, -1 previous); None past the ends."""
        stage = self.stage + step
        return self.rank_of(stage=stage) if 0 <= stage < self.pp else None

    def at(self, rank: int) -> Mesh:
        """The same mesh as rank `rank` sees it."""
        return dataclasses.replace(self, rank=rank)

    def __str__(self) -> str:
        experts = f", ep {self.ep}" if self.ep > 1 else ""
        return f"dp {self.dp} x pp {self.pp} x sp {self.sp} x tp {self.tp}{experts}"

    def _coordinates(self) -> tuple[int, int, int, int]:
        return (self.replica, self.stage, self.lane, self.tp_rank)

    def _axis(self, axis: str) -> int:
        if axis not in AXES:
            raise ConfigError(f"axis {axis!r}", fix=f"one of {', '.join(AXES)}")
        return AXES.index(axis)


def _nearest_tp(world_size: int, others: int, tp: int) -> int:
    """The largest tp of at most `tp` with which replicas fit `world_size` ranks exactly."""
    return next(size for size in range(tp, 0, -1) if world_size % (others * size) == 0)
