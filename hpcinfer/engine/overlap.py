"""From which size on two-batch overlap is used: decided at the start, by measuring this model on these links.

Dividing a step makes every matrix product smaller, so it pays only where the transfers that it hides cost more than that:
long prefills on a network, seldom a decode, never ranks that share memory. No formula knows where; a few layers on made-up
tokens do. Prefill is what is measured, so a step of decodes alone is divided only where the job gives a number.
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import torch

from hpcinfer.attention.metadata import build_metadata
from hpcinfer.batch import MicroBatch
from hpcinfer.comm.host import HostChannel
from hpcinfer.kvcache.pool import KvPool
from hpcinfer.models.base import StageModel
from hpcinfer.parallel.segments import Segments
from hpcinfer.pipeline.schedule import interleave
from hpcinfer.scheduler.limits import SchedulerLimits

OFF = 0
_LAYERS = 3
_REPEATS = 3
_LEAST_GAIN = 0.03
"""The divided step must be shorter by this share: less is within the noise of a measurement."""
_LEAST_TOKENS = 32
_LONGEST_S = 1.5


def with_two_batch(
    setting: str, model: StageModel, kv: KvPool, limits: SchedulerLimits, control: HostChannel, *, lane: int
) -> SchedulerLimits:
    """The limits with what `setting` comes to. Collective over the replica.

    Args:
        setting: `parallel.two_batch`.
        model, kv: with weights; no sequence may use the pages yet.
        control: over all ranks of the replica, which all get the same answer.
        lane: of this rank.
    """
    if setting == "off":
        return dataclasses.replace(limits, two_batch_tokens=OFF)
    if setting != "auto":
        return dataclasses.replace(limits, two_batch_tokens=int(setting))
    smallest = _smallest_that_gains(model, kv, limits, control, lane)
    model.forget_expert_load()  # of the measurement
    return dataclasses.replace(limits, two_batch_tokens=smallest, divide_decodes=False)


def _smallest_that_gains(
    model: StageModel, kv: KvPool, limits: SchedulerLimits, control: HostChannel, lane: int
) -> int:
    """The smallest prefill, in tokens of a lane, that is done sooner when it is divided; 0 where none is."""
    axes = model.axes
    num_tokens = min(limits.max_batch_tokens, min(limits.num_tokens, limits.max_context) // axes.sp.size)
    has_transfers = max(axes.tp.size, axes.ep.size, axes.sp.size) > 1
    if num_tokens < _LEAST_TOKENS or not any(control.all_gather(has_transfers)):
        return OFF
    num_tokens = min(num_tokens, _affordable(model, kv, control, lane))
    smallest = OFF
    while num_tokens >= _LEAST_TOKENS and _gains(model, kv, num_tokens, control, lane):
        smallest = num_tokens
        num_tokens //= 2
    return smallest


def _affordable(model: StageModel, kv: KvPool, control: HostChannel, lane: int) -> int:
    """Tokens of a prefill that takes about _LONGEST_S, from the time of a small one: the start must not last for ever."""
    small = [_microbatch(model, kv, lane, 0, _LEAST_TOKENS)]
    spent = [_time(model, kv, small, control, lane) for _ in range(2)]  # the first one warms up
    return int(_LEAST_TOKENS * _LONGEST_S / max(control.all_gather(spent[-1])))


def _gains(model: StageModel, kv: KvPool, num_tokens: int, control: HostChannel, lane: int) -> bool:
    """Whether all ranks together are done sooner with a prefill of `num_tokens` when it is divided."""
    whole = [_microbatch(model, kv, lane, 0, num_tokens)]
    half = num_tokens // 2
    halves = [_microbatch(model, kv, lane, 0, half), _microbatch(model, kv, lane, half, num_tokens)]
    spent = {1: [], 2: []}
    for _ in range(_REPEATS + 1):
        for parts in (whole, halves):
            spent[len(parts)].append(_time(model, kv, parts, control, lane))
    # The slowest rank of each repetition is what a step costs; the first one warms up.
    everyone = np.array(control.all_gather((spent[1][1:], spent[2][1:])))  # [ranks, 2, repeats]
    whole_s, halves_s = everyone.max(axis=0).min(axis=1)
    return bool(halves_s < (1 - _LEAST_GAIN) * whole_s)


@torch.inference_mode()
def _time(model: StageModel, kv: KvPool, parts: list[MicroBatch], control: HostChannel, lane: int) -> float:
    """Seconds that this rank takes for the layers of these parts, whose inputs are there."""
    forwards = [_layers(model, kv, part, lane) for part in parts]
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    control.barrier()
    start_s = time.perf_counter()
    interleave(forwards)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - start_s


def _layers(model: StageModel, kv: KvPool, part: MicroBatch, lane: int) -> Segments:
    metadata = build_metadata(part, kv.layout.block_size, model.device, lane=lane)
    rows = model.stream.num_rows(part.num_tokens)
    # Different tokens, so that a router spreads them over its experts; the same on all tp ranks.
    generator = torch.Generator(device="cpu").manual_seed(0)
    hidden = torch.randn(rows, model.config.hidden_size, generator=generator).to(model.dtype).to(model.device)
    return model.run_layers(hidden, metadata, kv, _LAYERS)


def _microbatch(model: StageModel, kv: KvPool, lane: int, start: int, end: int) -> MicroBatch:
    """A chunk of one made-up sequence on the first pages: `end - start` tokens for each lane, from start * lanes on."""
    num_lanes, block_size, count = model.axes.sp.size, kv.layout.block_size, end - start
    first = start * num_lanes + lane * count
    num_pages = -(-end * num_lanes // block_size)
    return MicroBatch(
        tick=0, sequence_ids=(0,), token_ids=np.zeros(count, np.int32), query_lens=np.array([count], np.int32),
        context_lens=np.array([first], np.int32), block_tables=np.arange(1, num_pages + 1, dtype=np.int32)[None],
        samples=np.array([False]), num_prefill_tokens=count, lane_tokens=(count,) * num_lanes,
        shared_lens=(count,) * num_lanes if num_lanes > 1 else (),
        # Page 1 is the first, so a position is at slot block_size + position.
        shared_slots=block_size + np.arange(start * num_lanes, end * num_lanes if num_lanes > 1 else start * num_lanes),
    )
