"""What hiding communication is worth: tp2 with two-batch overlap, pp2 with several microbatches in flight, in one run.

A random Llama-like model runs as tp2 and as pp2 on the same two ranks. The variants of a scenario are settings of one
scheduler over the same weights and links; they alternate, and medians over the repetitions count. Speed is judged by
the time of a step, or tokens a second where steps have different sizes: time waited hides the processor's own work for
TCP, and is reported beside it.

Limited by: two-batch overlap by the larger of computation and transfers, where a transfer's own processor time
(copies, sums, system calls) counts as computation; microbatches by the slowest stage, the filling of the pipeline, and
in decode by t(b) / t(b / 2), as dividing a batch of b makes each half less efficient.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

from hpcinfer.bench.overlap_cases import LAYOUTS, NUM_RANKS, OverlapOptions, Scenario, Variant, random_config, scenarios
from hpcinfer.bench.overlap_report import report
from hpcinfer.bench.overlap_trace import RunTraces
from hpcinfer.comm.bootstrap import World, split
from hpcinfer.comm.communicator import Communicator
from hpcinfer.config.job import EngineSection
from hpcinfer.config.model import ModelConfig
from hpcinfer.config.parallel import ParallelConfig
from hpcinfer.engine.build import build_replica
from hpcinfer.engine.replica_plan import plan_replica
from hpcinfer.engine.replica import Replica
from hpcinfer.errors import UsageError
from hpcinfer.launch.host_memory import available_host_bytes
from hpcinfer.models.footprint import DTYPE_BYTES, kv_bytes_per_token
from hpcinfer.models.random_weights import fill_random
from hpcinfer.observe.metrics import PhaseClock
from hpcinfer.parallel.groups import ReplicaGroups, build_groups
from hpcinfer.parallel.mesh import Mesh
from hpcinfer.request import Request, SamplingParams
from hpcinfer.scheduler.scheduler import Scheduler

PROGRESS_THREAD = "hpcinfer-progress"
"""Name of the thread of `comm.progress`."""
_LINK_BYTES = 2**24
_LINK_PINGS = 50


def run_overlap(options: OverlapOptions, world: World, *, link: str) -> dict | None:
    """Measure. Collective over the world, which must have 2 ranks. Returns the figures on rank 0.

    Args:
        link: what the ranks talk over, for the report.
    """
    if world.size != NUM_RANKS:
        raise UsageError(f"bench overlap on {world.size} ranks", fix=f"start it alone, or on {NUM_RANKS} ranks")
    probe = split(world, list(range(world.size)), "link")
    figures = {
        "benchmark": "overlap", **dataclasses.asdict(options), "link_used": link,
        "link_measured": measure_link(probe), "threads_per_rank": torch.get_num_threads(), "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
    }
    probe.close()
    asked = scenarios(options)
    traces = RunTraces(Path(options.trace), world) if options.trace else None
    layouts = [layout for layout in LAYOUTS if any(scenario.layout == layout for scenario in asked)]
    rigs = {layout: _Rig(options, world, layout, asked, traces) for layout in layouts}
    if "tp" in rigs:
        figures["agreed_two_batch_tokens"] = rigs["tp"].agreed_two_batch_tokens
    runs: dict[tuple[str, str], list[dict]] = {}
    for repeat in range(options.repeats + 1):
        if world.rank == 0:
            what = f"repetition {repeat} of {options.repeats}" if repeat else "warm-up"
            print(f"bench overlap: {what} over {link}", file=sys.stderr, flush=True)
        for scenario in asked:
            for variant in scenario.variants:
                run = rigs[scenario.layout].run(scenario, variant, is_last=repeat == options.repeats)
                if repeat and run is not None:
                    runs.setdefault((scenario.name, variant.name), []).append(run)
        if repeat and world.rank == 0:  # a run that is cut short leaves what it has
            figures["repetitions"], figures["load_average_end"] = repeat, os.getloadavg()[0]
            report(figures, asked, runs)
            _keep(figures, options.out)
    for rig in rigs.values():
        rig.close()
    return figures if world.rank == 0 else None


def _keep(figures: dict, out: str) -> None:
    if out:
        Path(out).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def measure_link(link: Communicator) -> dict[str, float]:
    """Bytes per second of a large message one way and both ways at once, and seconds of a small one, best of some.

    Collective over both ranks; the same figures on both.
    """
    data, small, other = torch.ones(_LINK_BYTES // 4), torch.ones(1), 1 - link.rank
    received = torch.empty_like(data)

    def one_way(tensor: torch.Tensor, into: torch.Tensor) -> None:
        if link.rank == 0:
            link.send(tensor, 1).wait()
            link.recv(small.clone(), 1).wait()
        else:
            link.recv(into, 0).wait()
            link.send(small, 0).wait()

    def both_ways() -> None:
        with link.group():
            handles = [link.recv(received, other), link.send(data, other)]
        for handle in handles:
            handle.wait()

    def pings() -> None:
        for _ in range(_LINK_PINGS):
            one_way(small, small.clone())

    link.warmup()
    best = torch.tensor([_best(link, lambda: one_way(data, received)), _best(link, both_ways), _best(link, pings)])
    link.all_reduce(best, "max").wait()
    one_way_s, both_s, pings_s = best.tolist()
    return {
        "bytes_per_s": data.nbytes / one_way_s, "both_ways_bytes_per_s": data.nbytes / both_s,
        "latency_s": pings_s / (2 * _LINK_PINGS),
    }


def _best(link: Communicator, function) -> float:
    times = []
    for _ in range(3):
        link.barrier()
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


class _Rig:
    """One layout with its weights, and runs of it under any scheduler limits. Every method is collective."""

    def __init__(
        self, options: OverlapOptions, world: World, layout: str, asked: list[Scenario], traces: RunTraces | None
    ) -> None:
        config = random_config(options)
        mine = [scenario for scenario in asked if scenario.layout == layout]
        parallel = ParallelConfig(**{layout: NUM_RANKS})
        self._world = world
        self._traces = traces
        self._groups = build_groups(world, Mesh.of(world.size, rank=world.rank, **{layout: NUM_RANKS}))
        self._vocab_size = config.vocab_size
        # The agreement on two-batch overlap measures steps from the largest prefill down.
        engine = EngineSection(
            max_sequences=max(variant.num_sequences for scenario in mine for variant in scenario.variants),
            max_context=max(scenario.prompt_tokens + scenario.output_tokens for scenario in mine),
            max_batch_tokens=max(options.prefill_sizes), kv_memory=f"{_kv_bytes(config, options, mine)} B",
        )
        plan = plan_replica(
            config, parallel, engine, self._groups, world.channel, dtype=options.dtype, device=torch.device("cpu"),
            available_bytes=available_host_bytes(NUM_RANKS),
        )
        self._replica = build_replica(
            plan, self._groups, clock=PhaseClock(), load=fill_random, recorder=traces and traces.recorder
        )
        self._limits = self._replica.scheduler.limits

    @property
    def agreed_two_batch_tokens(self) -> int:
        """From which size on a job with parallel.two_batch = auto would divide steps here; 0 where it would not."""
        return self._limits.two_batch_tokens

    def run(self, scenario: Scenario, variant: Variant, *, is_last: bool = False) -> dict | None:
        """One run. Returns its figures on rank 0, None on the other. The last one of a variant is kept as a trace."""
        replica, recorder = self._replica, self._traces and self._traces.recorder
        limits = dataclasses.replace(
            self._limits, lag=variant.lag, two_batch_tokens=variant.two_batch_tokens,
            divide_decodes=True, max_batch_tokens=scenario.batch_tokens,
        )
        # Ticks go on after a stop.
        scheduler = Scheduler(limits, self._groups.mesh.lane, first_tick=replica.scheduler.next_tick)
        replica.scheduler = scheduler
        self._world.channel.barrier()
        if recorder is not None:
            self._traces.begin()
        before, cpu_s, figures = _counters(self._groups), _cpu_s(), {}
        if replica.is_leader:
            figures = _lead(
                replica, self._groups, self._requests(scenario, variant), prefill=scenario.output_tokens == 1
            )
            replica.stop()
        else:
            replica.follow()
        after = _counters(self._groups)
        mine = {
            **{name: value - cpu_s[name] for name, value in _cpu_s().items()},
            "communicators": {
                name: {key: value - before[name][key] for key, value in counters.items()}
                for name, counters in after.items()
            },
        }
        if recorder is not None and is_last:
            self._traces.save(scenario, variant, self._groups)
        ranks = self._world.channel.all_gather(mine)
        return {**figures, "counters": dataclasses.asdict(scheduler.counters), "ranks": ranks} if figures else None

    def _requests(self, scenario: Scenario, variant: Variant) -> list[Request]:
        rng = np.random.default_rng(0)
        return [
            Request(
                row=row, prompt_token_ids=rng.integers(0, self._vocab_size, scenario.prompt_tokens).astype(np.int32),
                sampling=SamplingParams(max_tokens=scenario.output_tokens, ignore_eos=True),
            )
            for row in range(variant.num_sequences)
        ]

    def close(self) -> None:
        self._groups.close()


def _kv_bytes(config: ModelConfig, options: OverlapOptions, mine: list[Scenario]) -> int:
    """Pages for all sequences of the largest run at their full lengths, with room for pages not full or resting."""
    tokens = max(
        variant.num_sequences * (scenario.prompt_tokens + scenario.output_tokens + 32)
        for scenario in mine for variant in scenario.variants
    )
    per_token = kv_bytes_per_token(config, -(-config.num_layers // NUM_RANKS), 1, DTYPE_BYTES[options.dtype])
    return 2 * tokens * per_token


def _cpu_s() -> dict[str, float]:
    """Processor seconds of this rank so far: all of it, and the thread that moves transfers in the background."""
    background = [thread for thread in threading.enumerate() if thread.name == PROGRESS_THREAD]
    clocks = [time.pthread_getcpuclockid(thread.ident) for thread in background]
    return {"cpu_s": time.process_time(), "progress_cpu_s": sum(map(time.clock_gettime, clocks))}


def _counters(groups: ReplicaGroups) -> dict[str, dict[str, float]]:
    named = [*groups.communicators(), groups.control]
    return {item.name: dataclasses.asdict(item.counters) for item in named if item.size > 1}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    """The leader's state after a tick."""

    now_s: float
    waited_s: float
    prefill_tokens: int
    decode_tokens: int
    divided_steps: int


def _lead(replica: Replica, groups: ReplicaGroups, requests: list[Request], *, prefill: bool) -> dict:
    """Run the requests to their end; the figures are of the prefill as a whole, or of the decodes in mid-run."""
    ticks = [_tick(replica, groups)]
    ended = replica.step(requests)
    ticks.append(_tick(replica, groups))
    while not replica.is_idle:
        ended += replica.step([])
        ticks.append(_tick(replica, groups))
    first, last = (0, len(ticks) - 1) if prefill else steady(ticks, replica.scheduler.limits.lag)
    start, end = ticks[first], ticks[last]
    tokens = end.prefill_tokens - start.prefill_tokens if prefill else end.decode_tokens - start.decode_tokens
    rows = sorted(ended, key=lambda sequence: sequence.request.row)
    return {
        "seconds": end.now_s - start.now_s,
        "tokens": tokens,
        "leader_waited_s": end.waited_s - start.waited_s,
        "divided_steps": end.divided_steps - start.divided_steps,
        "output": [sequence.output_token_ids.tolist() for sequence in rows],
    }


def _tick(replica: Replica, groups: ReplicaGroups) -> Tick:
    counters = replica.scheduler.counters
    return Tick(
        now_s=time.perf_counter(), waited_s=groups.wait_s(), prefill_tokens=counters.prefill_tokens,
        decode_tokens=counters.decode_tokens, divided_steps=counters.divided_steps,
    )


def steady(ticks: list[Tick], lag: int) -> tuple[int, int]:
    """The ticks between which all sequences decode and the pipeline is full.

    The leader is held back by the results of tick n - lag, so its clock tells the pace of the whole pipeline.
    """
    last_prefill = max(i for i in range(1, len(ticks)) if ticks[i].prefill_tokens > ticks[i - 1].prefill_tokens)
    last_decode = max(i for i in range(1, len(ticks)) if ticks[i].decode_tokens > ticks[i - 1].decode_tokens)
    return last_prefill + lag, last_decode
