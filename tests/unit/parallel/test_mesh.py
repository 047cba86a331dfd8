"""The arithmetic of the mesh and the messages of layouts that do not fit."""

import itertools

import pytest

from hpcinfer.errors import ConfigError
from hpcinfer.parallel.mesh import AXES, Mesh


def test_tp_is_innermost_and_dp_outermost():
    mesh = Mesh.of(24, pp=3, sp=2, tp=2)
    assert mesh.dp == 2 and mesh.size == 24
    seen = [(m.replica, m.stage, m.lane, m.tp_rank) for m in map(mesh.at, range(24))]
    assert seen == list(itertools.product(range(2), range(3), range(2), range(2)))
    for rank, (replica, stage, lane, tp_rank) in enumerate(seen):
        at = mesh.at(rank)
        assert at.rank_of(replica=replica, stage=stage, lane=lane, tp_rank=tp_rank) == rank
        assert [at.index(axis) for axis in AXES] == [replica, stage, lane, tp_rank]


def test_ranks_of_an_axis_divide_the_world():
    mesh = Mesh.of(24, pp=3, sp=2, tp=2)
    for axis in AXES:
        groups = {tuple(mesh.at(rank).axis_ranks(axis)) for rank in range(24)}
        assert sorted(itertools.chain(*groups)) == list(range(24))
        assert all(len(group) == getattr(mesh, axis) for group in groups)


def test_neighbours_and_roles():
    mesh = Mesh.of(8, pp=2, tp=2, rank=6)  # replica 1, stage 1, tp rank 0
    assert mesh.replica_ranks() == [4, 5, 6, 7]
    assert mesh.stage_ranks() == [6, 7]
    assert mesh.neighbour(-1) == 4 and mesh.neighbour(+1) is None
    assert mesh.leader == 4 and mesh.sampler == 6
    assert mesh.is_sampler and not mesh.is_leader
    assert mesh.is_last_stage and not mesh.is_first_stage
    assert mesh.axis_ranks("dp") == [2, 6]
    assert str(mesh) == "dp 2 x pp 2 x sp 1 x tp 2"


def test_a_single_rank_has_every_role():
    mesh = Mesh()
    assert mesh.is_leader and mesh.is_sampler and mesh.is_first_stage and mesh.is_last_stage
    assert mesh.neighbour(1) is None and mesh.neighbour(-1) is None
    assert mesh.replica_ranks() == mesh.stage_ranks() == mesh.axis_ranks("tp") == [0]


@pytest.mark.parametrize(
    ("world_size", "sizes", "parts"),
    [
        (6, {"pp": 2, "tp": 2}, ["needs 4 ranks", "6 ranks", "start 4 or 8 ranks", "tp=1"]),
        (6, {"tp": 4}, ["needs 4 ranks", "start 4 or 8 ranks, or set tp=3"]),
        (3, {"tp": 4}, ["start 4 ranks, or set tp=3"]),
        (7, {"pp": 2}, ["start 6 or 8 ranks", "divides 7"]),
        (8, {"tp": 2, "dp": 3}, ["dp 3 x pp 1 x sp 1 x tp 2 needs 6 ranks", "8 ranks", "start 6 ranks, or set dp=4"]),
        (7, {"tp": 2, "dp": 3}, ["start 6 ranks"]),
        (4, {"tp": 0}, ["parallel.tp = 0", "at least 1"]),
        (4, {"dp": -1}, ["parallel.dp = -1"]),
        (8, {"sp": 2, "tp": 2, "ep": 3}, ["parallel.ep = 3", "one of 1, 2, 4"]),
    ],
)
def test_sizes_that_do_not_fit(world_size, sizes, parts):
    with pytest.raises(ConfigError) as caught:
        Mesh.of(world_size, **sizes)
    for part in parts:
        assert part in str(caught.value)


def test_wrong_coordinates():
    with pytest.raises(ConfigError, match="coordinate 2 on pp"):
        Mesh.of(4, pp=2).rank_of(stage=2)
    with pytest.raises(ConfigError, match="one of dp, pp, sp, tp"):
        Mesh().axis_ranks("ep")
    with pytest.raises(ConfigError, match="rank 4 of a mesh of 4 ranks"):
        Mesh.of(4, rank=4)


def test_expert_ranks():
    assert Mesh.of(8, sp=2, tp=2, ep=4).ep == 4
