"""Ranks for test_groups: host channels, agreement and the groups of several layouts, in one world's life."""

from __future__ import annotations

import sys

import torch

from hpcinfer.comm.bootstrap import World, start_world
from hpcinfer.errors import CommunicationError, ConfigError, HpcinferError, ReplicaDivergedError
from hpcinfer.launch.process import die_with_parent
from hpcinfer.launch.report import Place, run_as_rank
from hpcinfer.parallel.agree import agree, agree_or_raise
from hpcinfer.parallel.groups import build_groups
from hpcinfer.parallel.mesh import Mesh
from tests.mpi import use_stand_in_if_asked

LAYOUTS = [
    (4, {"tp": 4}), (4, {"pp": 4}), (4, {"pp": 2, "tp": 2}), (4, {"tp": 2}), (4, {"pp": 2}), (4, {}),
    (3, {"pp": 3}), (3, {"tp": 3}), (2, {"tp": 2}), (2, {"pp": 2}), (1, {}), (4, {"pp": 2, "sp": 2}),
    (4, {"sp": 2, "tp": 2, "ep": 4}), (4, {"sp": 2, "tp": 2, "ep": 2}), (3, {"sp": 3, "ep": 3}), (4, {"pp": 2, "tp": 2, "ep": 2}),
]


def channel_cases(world: World) -> None:
    channel, rank, size = world.channel, world.rank, world.size
    for root in range(size):
        # Around the size of the first packet, and far beyond it.
        for length in (0, 1, 8000, 8150, 8170, 8180, 8192, 9000, 3_000_000):
            sent = (root, bytes(length), "x" * (length % 7)) if rank == root else None
            received = channel.broadcast(sent, root)
            assert received == (root, bytes(length), "x" * (length % 7)), (root, length)
    assert channel.all_gather({"rank": rank, "pad": "y" * rank * 5000}) == [
        {"rank": r, "pad": "y" * r * 5000} for r in range(size)
    ]
    for root in range(size):
        gathered = channel.gather((rank, None), root)
        assert gathered == ([(r, None) for r in range(size)] if rank == root else None)
    channel.barrier()
    if rank == size - 1:
        began = channel.counters.wait_s
        try:
            channel.barrier(deadline_s=0.3)  # nobody else is here yet
        except CommunicationError as error:
            assert "deadline of 0.3 s" in str(error) and "'world'" in str(error), error
        else:
            raise AssertionError("the barrier ended without the others")
        assert channel.counters.wait_s - began > 0.25


def agree_cases(world: World) -> None:
    channel, rank = world.channel, world.rank
    agreed = agree(channel, minimum={"blocks": 100 - rank, "tokens": 5 + rank}, leader={"backend": f"of {rank}"})
    assert agreed == {"blocks": 100 - world.size + 1, "tokens": 5, "backend": "of 0"}, agreed
    try:
        agree(channel, minimum={"blocks": 1} if rank else {"blocks": 1, "more": 2}, leader={})
    except ReplicaDivergedError as error:
        assert "more" in str(error) and error.agreed
    else:
        assert world.size == 1
    assert agree_or_raise(channel, lambda: {"answer": 42}) == {"answer": 42}

    def fail() -> None:
        assert rank == 0, "only rank 0 runs it"
        raise ConfigError("wrong", found="this", fix="that")

    try:
        agree_or_raise(channel, fail)
    except HpcinferError as error:
        assert type(error) is ConfigError and str(error) == str(ConfigError("wrong", found="this", fix="that"))
        assert error.agreed and error.exit_code == 2
    else:
        raise AssertionError("the error did not arrive")


def layout_case(world: World, sizes: dict[str, int]) -> None:
    mesh = Mesh.of(world.size, **sizes, rank=world.rank)
    groups = build_groups(world, mesh)
    groups.warmup()
    total = groups.axes.tp.all_reduce(torch.tensor([float(world.rank)])).wait()
    assert total.item() == sum(mesh.axis_ranks("tp")), (sizes, total)
    # A token of every stage's rank travels down the pipeline and back to the leader.
    baggage = torch.tensor([float(world.rank)])
    if groups.from_previous is not None:
        before = groups.from_previous.recv(torch.empty(1), 0).wait()
        assert before.item() == mesh.neighbour(-1), (sizes, world.rank, before)
        assert groups.from_previous.rank == 1
    if groups.to_next is not None:
        groups.to_next.send(baggage, 1).wait()
        assert groups.to_next.name == f"pp {mesh.stage}>{mesh.stage + 1}"
    assert (groups.from_previous is None) == mesh.is_first_stage
    assert (groups.to_next is None) == mesh.is_last_stage
    samplers = {lane: mesh.rank_of(stage=mesh.pp - 1, lane=lane, tp_rank=0) for lane in range(mesh.sp)}
    if mesh.is_leader:
        assert list(groups.tokens) == [lane for lane, sampler in samplers.items() if sampler != mesh.leader]
        for lane, link in groups.tokens.items():
            ids = link.recv(torch.empty(3, dtype=torch.int64), 0).wait()
            assert ids.tolist() == [samplers[lane]] * 3, ids
    elif mesh.is_sampler:
        groups.tokens[mesh.lane].send(torch.full((3,), world.rank), 1).wait()
    else:
        assert not groups.tokens
    lanes = groups.axes.sp.all_gather(torch.tensor([world.rank])).wait()
    assert lanes.tolist() == mesh.axis_ranks("sp") and groups.axes.sp.rank == mesh.lane
    wanted = {1: [world.rank], mesh.tp: mesh.axis_ranks("tp"), mesh.sp * mesh.tp: mesh.stage_ranks()}[mesh.ep]
    assert groups.axes.ep.all_gather(torch.tensor([world.rank])).wait().tolist() == wanted
    assert groups.axes.ep_spans_lanes == (mesh.ep > mesh.tp)
    everyone = groups.control.all_gather(world.rank)
    assert everyone == mesh.replica_ranks() and everyone[groups.control.rank] == world.rank
    assert groups.control.broadcast(world.rank) == mesh.leader
    groups.check()
    assert groups.wait_s() >= 0
    groups.close()
    try:
        build_groups(world, Mesh.of(world.size + 1, rank=world.rank))
    except ConfigError as error:
        assert f"a world of {world.size} ranks" in str(error)
    else:
        raise AssertionError("a mesh of another size was taken")


def main(place: Place) -> int:
    world = start_world(deadline_s=30)
    place.rank, place.size, place.host, place.abort = world.rank, world.size, world.host, world.abort
    use_stand_in_if_asked(world)
    assert world.strict, "the test helper switches strict mode on"
    assert world.local_rank == world.rank and world.num_nodes == 1 and world.local_size == world.size
    agree_cases(world)
    for num_ranks, sizes in LAYOUTS:
        part = world.first(num_ranks)
        if part is not None:
            layout_case(part, sizes)
        world.channel.barrier()
    spare = world.first(3)  # the failing barrier spoils its channel
    if spare is not None:
        channel_cases(spare)
    world.channel.barrier()
    if world.rank == 0:
        print(f"{len(LAYOUTS)} layouts fine", flush=True)
    if spare is not None and spare.rank < 2:
        spare.channel.barrier()
    world.channel.barrier()
    world.close()
    return 0


if __name__ == "__main__":
    die_with_parent()
    sys.exit(run_as_rank(main))
