"""Generation speed of one replica on a fixed workload, on a checkpoint or on random weights of given dimensions.

Limited by: in decode, the memory bandwidth (a step reads all weights once, and the keys and values of every sequence); in
prefill, the matrix rate (2 operations a weight and token). The shares say how near to these limits the phases came. For mixtures
a decode step counts all experts' weights, which a few dozen sequences reach.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import resource
import time
from pathlib import Path

import torch

from hpcinfer.bench.dimensions import DIMENSIONS
from hpcinfer.bench.limits import MachineLimits, machine_limits
from hpcinfer.bench.peer import transformers_tokens_per_s
from hpcinfer.bench.workloads import find_workload, make_requests
from hpcinfer.comm.bootstrap import World
from hpcinfer.config.job import EngineSection
from hpcinfer.config.model import ModelConfig
from hpcinfer.config.parallel import ParallelConfig
from hpcinfer.engine.build import build_replica
from hpcinfer.engine.replica_plan import ReplicaPlan, plan_replica
from hpcinfer.engine.memory import available_bytes
from hpcinfer.engine.profile import meter_of
from hpcinfer.engine.replica import Replica
from hpcinfer.errors import CheckpointError, ConfigError, UsageError
from hpcinfer.models.base import StageModel
from hpcinfer.models.checkpoint import Checkpoint
from hpcinfer.models.footprint import DTYPE_BYTES, kv_bytes_per_token, layer_cost, weight_bytes
from hpcinfer.models.random_weights import fill_random
from hpcinfer.models.weights import load_stage
from hpcinfer.observe.metrics import PhaseClock
from hpcinfer.parallel.agree import agree_or_raise
from hpcinfer.parallel.groups import build_groups
from hpcinfer.parallel.mesh import Mesh
from hpcinfer.request import Request
_MOST_SEQUENCES = 512
_PEER_BATCH = 64


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GenerateOptions:
    """What is measured."""

    model: str = "small"
    """A checkpoint folder, a config.json (random weights), or a name of DIMENSIONS (random weights)."""
    workload: str = "W1"
    """W1: 64 prompts of 16-128 tokens, 128 out; W2: 64 x 512 in, 16 out; W3: 64 prompts of 16-128, 8-256 out; chat: 1000 prompts,
    log-normal lengths of mean 227 in and 188 out; or INxOUT."""
    prompts: int = 0
    """Number of prompts; 0: the workload's."""
    sequences: int = 0
    """Most sequences in work at once; 0: all prompts, at most 512."""
    batch_tokens: int = 2048
    """Most tokens of a step."""
    dtype: str = "bfloat16"
    """float32, bfloat16 or float16."""
    device: str = "auto"
    """auto, cpu or cuda."""
    tp: int = 1
    """Tensor parallel ranks."""
    pp: int = 1
    """Pipeline stages."""
    repeats: int = 1
    """Times the workload is run after one warm-up; the median counts."""
    attention: str = "auto"
    """Attention backend."""
    experts: str = "unpacked"
    """MXFP4 experts in memory: unpacked or packed."""
    graphs: str = "auto"
    """Capture decode steps: auto, on or off."""
    run_ahead: str = "auto"
    """Queue steps before tokens are known: auto, on or off."""
    against: str = ""
    """"transformers": the same work by its generate, in the same run, on one rank."""


def run_generate(options: GenerateOptions, world: World) -> dict | None:
    """Measure. Collective over the world, which must have tp x pp ranks. Returns the figures on rank 0."""
    world.use_device(options.device)
    config, checkpoint = agree_or_raise(world.channel, lambda: _model(options))
    workload = find_workload(options.workload, options.prompts)
    mesh = Mesh.of(world.size, pp=options.pp, tp=options.tp, dp=1, rank=world.rank)
    groups = build_groups(world, mesh)
    clock = PhaseClock()
    num_sequences = options.sequences or min(workload.num_prompts, _MOST_SEQUENCES)
    plan = plan_replica(
        config, ParallelConfig(tp=options.tp, pp=options.pp),
        EngineSection(
            max_sequences=num_sequences, max_context=workload.longest, max_batch_tokens=options.batch_tokens,
            attention=options.attention, graphs=options.graphs, run_ahead=options.run_ahead,
        ),
        groups, world.channel, dtype=options.dtype, device=world.device,
        available_bytes=available_bytes(
            world.device, num_local_ranks=world.local_size, num_device_ranks=world.num_device_ranks
        ),
    )

    def load(stage: StageModel) -> None:
        if checkpoint is None:
            fill_random(stage)
        else:
            load_stage(stage, checkpoint, world)

    replica = build_replica(plan, groups, clock=clock, load=load, meter=meter_of(world.device))
    load_s = clock.seconds["load"]
    requests = make_requests(workload, config.vocab_size)
    runs = []
    if replica.is_leader:
        for _ in range(options.repeats + 1):
            runs.append(_run_once(replica, clock, requests))
        replica.stop()
    else:
        replica.follow()
    peaks = world.channel.all_gather(_peak_bytes(world.device))
    replica.close()
    del replica
    groups.close()
    if world.rank != 0:
        return None
    measured = sorted(runs[1:], key=lambda run: run["seconds"])[len(runs[1:]) // 2]
    figures = _figures(options, plan, requests, measured, machine_limits(options.dtype, world.device), load_s, peaks)
    if options.against:
        figures["transformers"] = transformers_tokens_per_s(
            DIMENSIONS[options.model], requests, dtype=getattr(torch, options.dtype), device=world.device,
            batch_size=min(num_sequences, _PEER_BATCH),
        )
    return figures


def _model(options: GenerateOptions) -> tuple[ModelConfig, Checkpoint | None]:
    """The model's config, and its weights if there are any."""
    name = options.model
    if options.against and (options.against != "transformers" or name not in DIMENSIONS or options.tp * options.pp > 1):
        raise UsageError(
            f"--against {options.against}", fix="--against transformers, with a model of known dimensions on one rank"
        )
    config, checkpoint = _config(name)
    return dataclasses.replace(config, packed_experts=options.experts == "packed"), checkpoint


def _config(name: str) -> tuple[ModelConfig, Checkpoint | None]:
    if name in DIMENSIONS:
        return ModelConfig.from_dict(DIMENSIONS[name]), None
    path = Path(name)
    if path.is_dir():
        has_weights = any(path.glob("*.safetensors"))
        return ModelConfig.from_folder(path), Checkpoint(path) if has_weights else None
    if path.is_file():
        try:
            return ModelConfig.from_dict(json.loads(path.read_text()), source=name), None
        except ValueError as error:
            raise CheckpointError(f"{name} is not JSON", found=str(error)) from error
    raise ConfigError(f"no model {name!r}", fix=f"give a folder, a config.json or one of {', '.join(DIMENSIONS)}")


def _peak_bytes(device: torch.device) -> int:
    """Most memory that this rank had: of its GPU, or of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _run_once(replica: Replica, clock: PhaseClock, requests: list[Request]) -> dict:
    before, counters = dict(clock.seconds), dataclasses.asdict(replica.scheduler.counters)
    start = time.perf_counter()
    ended = replica.step(requests)
    while not replica.is_idle:
        ended += replica.step([])
    seconds = time.perf_counter() - start
    after = dataclasses.asdict(replica.scheduler.counters)
    return {
        "seconds": seconds,
        "output_tokens": sum(len(sequence.output_token_ids) for sequence in ended),
        "phases": {name: clock.seconds[name] - before[name] for name in ("prefill", "decode", "communication")},
        "counters": {name: after[name] - counters[name] for name in after},
    }


def _figures(
    options: GenerateOptions,
    plan: ReplicaPlan,
    requests: list[Request],
    run: dict,
    limits: MachineLimits,
    load_s: float,
    peaks: list[int],
) -> dict:
    counters, phases, width = run["counters"], run["phases"], DTYPE_BYTES[plan.dtype]
    # Per rank: its stage's weights and pages. The embedding is a lookup of a few rows, not a read of the table.
    weights = weight_bytes(plan.model, plan.layers, options.tp, width)
    if not plan.model.tie_word_embeddings or options.pp > 1:
        weights -= plan.model.vocab_size * plan.model.hidden_size // options.tp * width
    kv = kv_bytes_per_token(plan.model, len(plan.layers), options.tp, width)
    decode_bytes = counters["decode_microbatches"] * weights + counters["decode_context_tokens"] * kv
    prefill_flops = 2 * counters["prefill_tokens"] * sum(layer_cost(plan.model, i, options.tp) for i in plan.layers)
    return {
        "benchmark": "generate",
        **dataclasses.asdict(options),
        "attention": plan.attention.name,
        "ranks": options.tp * options.pp,
        "threads_per_rank": torch.get_num_threads(),
        "prompt_tokens": sum(len(request.prompt_token_ids) for request in requests),
        "output_tokens": run["output_tokens"],
        "seconds": run["seconds"],
        "output_tokens_per_s": run["output_tokens"] / run["seconds"],
        "phase_seconds": phases,
        "load_seconds": load_s,
        "peak_memory_bytes": sum(peaks),
        "decode_share_of_bandwidth": _share(decode_bytes / limits.read_bytes_per_s, phases["decode"]),
        "prefill_share_of_matrix_rate": _share(prefill_flops / limits.matmul_flops_per_s, phases["prefill"]),
        "limits": dataclasses.asdict(limits),
        "counters": counters,
        "machine": _machine(plan.device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _share(least_s: float, spent_s: float) -> float | None:
    return least_s / spent_s if spent_s > 0 else None
