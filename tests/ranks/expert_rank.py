"""Ranks for test_expert: dispatch and combine over real communicators of 1 to 4 ranks, both forms, interleaved too."""

from __future__ import annotations

import sys

import torch

from hpcinfer.comm.bootstrap import World, split, start_world
from hpcinfer.launch.process import die_with_parent
from hpcinfer.launch.report import Place, run_as_rank
from hpcinfer.parallel.segments import Segments, run_to_end
from tests.mpi import use_stand_in_if_asked
from tests.unit.parallel.expert_cases import CASES, Tokens


def check_case(world: World, name: str) -> int:
    """Every form and dtype of a case on the first ranks of the world. Collective. Returns the forwards run."""
    size = len(CASES[name]["rows"])
    members = list(range(size)) if world.rank < size else None
    ep = split(world, members, f"ep {name}")
    if ep is None:
        return 0
    done = 0
    for dtype in (torch.float32, torch.bfloat16):
        tokens = Tokens(**CASES[name], dtype=dtype)
        for gathered in (True, False) if dtype == torch.float32 else ():
            tokens.check(ep.rank, run_to_end(tokens.forward(ep, gathered=gathered)))
            done += 1
        # Two microbatches that take turns, as in two-batch overlap.
        for result in take_turns([tokens.forward(ep, gathered=gathered) for gathered in (True, False)]):
            tokens.check(ep.rank, result)
            done += 1
    ep.close()
    return done


def take_turns(forwards: list[Segments]) -> list[torch.Tensor]:
    """Drive forwards so that each one's transfer is in flight while the next computes."""
    waiting = [(index, forward, next(forward)) for index, forward in enumerate(forwards)]
    results: dict[int, torch.Tensor] = {}
    while waiting:
        index, forward, handle = waiting.pop(0)
        try:
            waiting.append((index, forward, forward.send(handle.wait())))
        except StopIteration as end:
            results[index] = end.value
    return [results[index] for index in range(len(forwards))]


def main(place: Place) -> int:
    world = start_world(deadline_s=30)
    place.rank, place.size, place.host, place.abort = world.rank, world.size, world.host, world.abort
    use_stand_in_if_asked(world)
    assert world.strict, "the test helper switches strict mode on"
    with torch.inference_mode():
        done = sum(check_case(world, name) for name in CASES)
    totals = world.channel.all_gather(done)
    if world.rank == 0:
        print(f"{totals} forwards fine", flush=True)
    world.channel.barrier()
    world.close()
    return 0


if __name__ == "__main__":
    die_with_parent()
    sys.exit(run_as_rank(main))
