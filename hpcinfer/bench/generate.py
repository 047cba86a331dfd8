"""Generation speed of one replica on a fixed workload, on a checkpoint or on random weights of given dimensions.

Limited by: in decode, the memory bandwidth (a step reads all weights once, and the keys and values of every sequence); in
prefill, the matrix rate (2 operations a weight and token). The shares say how near to these limits the phases came.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import resource
import time
from pathlib import Path

import torch

from hpcinfer.bench.limits import MachineLimits, machine_limits
from hpcinfer.bench.workloads import find_workload, make_requests
from hpcinfer.comm.bootstrap import World
from hpcinfer.config.job import EngineSection
from hpcinfer.config.model import ModelConfig
from hpcinfer.config.parallel import ParallelConfig
from hpcinfer.engine.build import build_replica
from hpcinfer.engine.replica_plan import ReplicaPlan, plan_replica
from hpcinfer.engine.memory import available_bytes
from hpcinfer.engine.replica import Replica
from hpcinfer.errors import CheckpointError, ConfigError
from hpcinfer.models.base import StageModel
from hpcinfer.models.checkpoint import Checkpoint
from hpcinfer.models.footprint import DTYPE_BYTES, kv_bytes_per_token, layer_cost, stage_parameters
from hpcinfer.models.random_weights import fill_random
from hpcinfer.models.weights import load_stage
from hpcinfer.observe.metrics import PhaseClock
from hpcinfer.parallel.agree import agree_or_raise
from hpcinfer.parallel.groups import build_groups
from hpcinfer.parallel.mesh import Mesh
from hpcinfer.request import Request

DIMENSIONS: dict[str, dict] = {
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960, "rope_theta": 1e6, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
    },
}
DIMENSIONS["qwen3-0.6b-32k"] = {**DIMENSIONS["qwen3-0.6b"], "vocab_size": 32000}
DIMENSIONS["small"] = {
    **DIMENSIONS["qwen3-0.6b-32k"], "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 4096,
}
"""Contents of config.json by name, for random weights. qwen3-0.6b-32k: published dimensions, a vocabulary of 32,000."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GenerateOptions:
    """What is measured."""

    model: str = "small"
    """A checkpoint folder, a config.json (random weights), or a name of DIMENSIONS (random weights)."""
    workload: str = "W1"
    """W1: 64 prompts of 16-128 tokens, 128 out; W2: 64 x 512 in, 16 out; W3: 64 prompts of 16-128, 8-256 out."""
    dtype: str = "bfloat16"
    """float32, bfloat16 or float16."""
    tp: int = 1
    """Tensor parallel ranks."""
    pp: int = 1
    """Pipeline stages."""
    repeats: int = 1
    """Times the workload is run after one warm-up; the median counts."""
    attention: str = "auto"
    """Attention backend."""


def run_generate(options: GenerateOptions, world: World) -> dict | None:
    """Measure. Collective over the world, which must have tp x pp ranks. Returns the figures on rank 0."""
    config, checkpoint = agree_or_raise(world.channel, lambda: _model(options.model))
    workload = find_workload(options.workload)
    parallel = ParallelConfig(tp=options.tp, pp=options.pp)
    mesh = Mesh.of(world.size, pp=options.pp, tp=options.tp, dp=1, rank=world.rank)
    groups = build_groups(world, mesh)
    clock = PhaseClock()
    plan = plan_replica(
        config, parallel,
        EngineSection(max_sequences=workload.num_prompts, max_context=workload.longest, attention=options.attention),
        groups, world.channel, dtype=options.dtype, device=torch.device("cpu"),
        available_bytes=available_bytes(
            world.device, num_local_ranks=world.local_size, num_device_ranks=world.num_device_ranks
        ),
    )

    def load(stage: StageModel) -> None:
        if checkpoint is None:
            fill_random(stage)
        else:
            load_stage(stage, checkpoint, world)

    replica = build_replica(plan, groups, clock=clock, load=load)
    load_s = clock.seconds["load"]
    requests = make_requests(workload, config.vocab_size)
    runs = []
    if replica.is_leader:
        for _ in range(options.repeats + 1):
            runs.append(_run_once(replica, clock, requests))
        replica.stop()
    else:
        replica.follow()
    peaks = world.channel.all_gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    groups.close()
    if world.rank != 0:
        return None
    measured = sorted(runs[1:], key=lambda run: run["seconds"])[len(runs[1:]) // 2]
    return _figures(options, plan, requests, measured, machine_limits(options.dtype), load_s, peaks)


def _model(name: str) -> tuple[ModelConfig, Checkpoint | None]:
    """The model's config, and its weights if there are any."""
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
    weights = stage_parameters(plan.model, plan.layers, options.tp) * width
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
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }


def _share(least_s: float, spent_s: float) -> float | None:
    return least_s / spent_s if spent_s > 0 else None
