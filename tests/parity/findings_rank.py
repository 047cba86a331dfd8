"""Runs on every rank: requests for log-probabilities, scores and embeddings through several layouts in one process life, each on a
sub-world of the ranks.

usage: findings_rank.py CHECKPOINT CASES.json FOLDER

Rank 0 writes the generations of each layout to FOLDER/<number of the layout>.h5.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from hpcinfer.comm.bootstrap import World, start_world
from hpcinfer.data.generations import encode_generations
from hpcinfer.engine.outcome import generation_of
from hpcinfer.engine.requests import RequestBuilder
from hpcinfer.launch.report import Place, run_as_rank
from hpcinfer.request import Generation, Request, SamplingParams, TaskParams
from tests.mpi import use_stand_in_if_asked
from tests.parity.parity_rank import build_layout


def run_layout(world: World, folder: str, case: dict, cases: dict, requests: list[Request]) -> list[Generation]:
    """The generations on rank 0, nothing on the others. The first row is drained in its middle, and goes on as a partial row."""
    engine = {**cases["engine"], **case.get("engine", {})}
    groups, replica, graphs = build_layout(
        world, folder, case["layout"], engine, case.get("num_blocks", cases["num_blocks"]), case.get("captured", False)
    )
    ended = []
    if replica.is_leader:
        builder = RequestBuilder(None, cases["vocab_size"])
        replica.step(requests[:1])
        for _ in range(cases["ticks"]):
            replica.step([])
        (partial,) = [generation_of(sequence, None) for sequence in replica.step([], drain=True)]
        first = requests[0]
        assert 0 < len(partial.token_ids) < first.sampling.max_tokens
        resumed = builder.build(
            row=first.row, prompt_token_ids=first.prompt_token_ids, sampling=first.sampling, earlier=partial
        )
        assert len(resumed.output_token_ids), "it begins anew"
        ended = replica.step([resumed, *requests[1:]])
        while not replica.is_idle:
            ended += replica.step([])
        replica.stop()
        counters = replica.scheduler.counters
        for name in case.get("counters", ("chunked_prefills", "preemptions")):
            assert getattr(counters, name), f"{name} did not happen: {counters}"
        assert not case.get("captured") or any(graph.replays for graph in graphs)
    else:
        replica.follow()
    replica.close()
    groups.close()
    return [generation_of(sequence, None) for sequence in ended]


def main(place: Place) -> int:
    folder, cases_file, results = sys.argv[1:]
    cases = json.loads(Path(cases_file).read_text())
    world = start_world()
    place.rank, place.size, place.host, place.abort = world.rank, world.size, world.host, world.abort
    use_stand_in_if_asked(world)
    requests = [
        RequestBuilder(None, cases["vocab_size"], task=TaskParams(**entry.get("task", {}))).build(
            row=row, prompt_token_ids=np.array(entry["prompt"], np.int32), sampling=SamplingParams(**entry["sampling"]),
            score_from=entry.get("score_from", 1),
        )
        for row, entry in enumerate(cases["rows"])
    ]
    for number, case in enumerate(cases["layouts"]):
        sub = world.first(case["ranks"])
        if sub is not None:
            generations = run_layout(sub, folder, case, cases, requests)
            if world.rank == 0:
                (Path(results) / f"{number}.h5").write_bytes(encode_generations(generations, "uuid"))
        world.channel.barrier()
    world.close()
    return 0


if __name__ == "__main__":
    sys.exit(run_as_rank(main))
