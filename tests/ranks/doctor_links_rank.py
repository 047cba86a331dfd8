"""Ranks for test_doctor_links: the transfers of the doctor's probes, on any kind of communicator."""

from __future__ import annotations

import sys

from hpcinfer.comm.bootstrap import start_world
from hpcinfer.doctor.examine import name_places
from hpcinfer.doctor.network import gather_network, judge_network
from hpcinfer.doctor.roll_call import roll_call
from hpcinfer.launch.process import die_with_parent
from hpcinfer.launch.report import Place, run_as_rank
from tests.mpi import use_stand_in_if_asked


def main(place: Place) -> int:
    world = start_world(deadline_s=40)
    place.rank, place.size, place.host, place.abort = world.rank, world.size, world.host, world.abort
    use_stand_in_if_asked(world)
    places = name_places(world.channel.all_gather((world.host, world.node_index, world.local_rank)))
    roll_call(world, places, "links", deadline_s=40)
    facts = world.channel.gather(gather_network(world, places))
    if world.rank == 0:
        check(facts, "NCCL" if world.nccl is not None else "MPI", world.num_nodes)
    world.close()
    return 0


def check(facts, transport: str, num_nodes: int) -> None:
    """Every rank measured what it should, and all of it is a number of this world."""
    firsts = [each for each in facts if each.place.local_rank == 0]
    assert {each.transport for each in facts} == {transport} and len(firsts) == num_nodes
    for each in facts:
        assert each.inside.num_ranks == 2 and 0 < each.inside.latency_s < 10 and each.inside.bytes_per_s > 0
        assert [pair.peer for pair in each.inside_pairs] == [1 - each.place.local_rank]
        assert (each.between is not None) == (each in firsts)
        others = [node for node in range(num_nodes) if node != each.place.node]
        assert sorted(pair.peer for pair in each.between_pairs) == (others if each in firsts else [])
        assert all(pair.latency_s > 0 and pair.bytes_per_s > 0 for pair in (*each.inside_pairs, *each.between_pairs))
    assert [finding for finding in judge_network(facts) if transport in finding.found]
    print(f"{len(facts)} ranks measured over {transport}", flush=True)


if __name__ == "__main__":
    die_with_parent()
    sys.exit(run_as_rank(main))
