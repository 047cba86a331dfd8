"""K/V pages of a GPU, from a measurement: the largest step is computed once, and what it leaves free is for pages.

No formula knows the work space of kernels and libraries. What is measured is the most that a step holds: all its tokens in
prefill, as many logits as sequences may draw, and their sampling.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np
import torch

from hpcinfer.batch import MicroBatch
from hpcinfer.comm.host import HostChannel
from hpcinfer.config.job import EngineSection
from hpcinfer.engine.memory import fit_blocks
from hpcinfer.models.base import StageInputs, StageModel
from hpcinfer.parallel.agree import agree
from hpcinfer.parallel.segments import run_to_end
from hpcinfer.request import Request, SamplingParams
from hpcinfer.sampling.history import History
from hpcinfer.sampling.sampler import SamplingBatch, sample
from hpcinfer.scheduler.limits import SchedulerLimits
from hpcinfer.units import format_bytes


class Meter(Protocol):
    """Memory of a device."""

    def begin(self) -> None:
        """Forget the peak so far."""

    def peak_bytes(self) -> int:
        """The most that was allocated at once since `begin`, beyond what was then."""

    def free_bytes(self) -> int:
        """What this rank could still allocate."""


class CudaMeter:
    """The memory of a GPU, as torch's allocator and the driver see it.

    Args:
        device: of this rank.
        num_ranks: ranks that share it.
    """

    def __init__(self, device: torch.device, *, num_ranks: int = 1) -> None:
        self._device = device
        self._num_ranks = num_ranks
        self._before = 0

    def begin(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def peak_bytes(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - self._before

    def free_bytes(self) -> int:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # what torch keeps for later counts as free
        return torch.cuda.mem_get_info(self._device)[0] // self._num_ranks


def meter_of(device: torch.device, *, num_ranks: int = 1) -> Meter | None:
    """What measures a device; None for a CPU, whose pages are computed alone: other programs share its memory."""
    return CudaMeter(device, num_ranks=num_ranks) if device.type == "cuda" else None


def profiled_limits(
    model: StageModel,
    limits: SchedulerLimits,
    engine: EngineSection,
    control: HostChannel,
    *,
    lane: int,
    meter: Meter,
) -> SchedulerLimits:
    """The limits with as many pages as are free beside the largest step, on the rank with fewest. Collective over the replica.

    Args:
        model: with its weights.
        limits: with the number of pages that was computed beforehand; an explicit `engine.kv_memory` keeps its number, where it
            fits.
        engine: memory settings.
        lane: of this rank.
        meter: of this rank's device.

    Raises:
        ConfigError: the largest step does not leave room for one sequence.
    """
    meter.begin()
    step = largest_step(limits, lane)
    _compute(model, limits, step)
    peak = meter.peak_bytes()
    layout = model.kv_layout(limits.block_size)
    page_bytes = layout.bytes_per_block(model.dtype.itemsize) * len(model.layer_range)
    pages_of_step = page_bytes * _num_blocks(step, limits)
    free = meter.free_bytes() - (peak - pages_of_step)
    blocks = fit_blocks(
        model.config, engine, block_size=limits.block_size, page_bytes=page_bytes, free_bytes=max(free, 0), device_type=model.device.type,
        spent=f"weights and {format_bytes(peak - pages_of_step)} of working space, measured",
    )
    if engine.kv_memory != "auto":
        blocks = min(blocks, limits.num_blocks)
    agreed = agree(control, minimum={"num_blocks": blocks}, leader={})
    return dataclasses.replace(limits, num_blocks=agreed["num_blocks"])


def largest_step(limits: SchedulerLimits, lane: int) -> MicroBatch:
    """A step of one lane with `max_batch_tokens` tokens of as many sequences as there may be, which all draw."""
    num_tokens, lanes = limits.max_batch_tokens, limits.num_lanes
    num_entries = min(num_tokens, limits.max_sequences)
    query_lens = np.full(num_entries, num_tokens // num_entries, np.int32)
    query_lens[: num_tokens % num_entries] += 1
    query_lens = np.minimum(query_lens, limits.max_context)
    blocks = -(-query_lens // limits.block_size)
    tables = np.zeros((num_entries, int(blocks.max())), np.int32)
    first = 1
    for entry, count in enumerate(blocks.tolist()):
        tables[entry, :count] = np.arange(first, first + count)
        first += count
    total = int(query_lens.sum())
    return MicroBatch(
        tick=0, sequence_ids=tuple(range(num_entries)), token_ids=np.zeros(total, np.int32), query_lens=query_lens,
        context_lens=np.zeros(num_entries, np.int32), block_tables=tables, samples=np.ones(num_entries, bool),
        num_prefill_tokens=total, lane_tokens=(total,) * lanes,
    )


def _num_blocks(step: MicroBatch, limits: SchedulerLimits) -> int:
    return int((-(-step.query_lens // limits.block_size)).sum()) + 1


@torch.inference_mode()
def _compute(model: StageModel, limits: SchedulerLimits, step: MicroBatch) -> None:
    """All of the stage, and on the last one the drawing of the tokens."""
    kv = model.allocate_kv(num_blocks=_num_blocks(step, limits), block_size=limits.block_size)
    hidden = None
    if not model.is_first:
        rows = model.stream.num_rows(step.num_tokens)
        hidden = torch.randn(rows, model.config.hidden_size, device=model.device, dtype=model.dtype)
    inputs = StageInputs.from_microbatch(step, block_size=limits.block_size, device=model.device, hidden=hidden)
    output = run_to_end(model.forward(inputs, kv))
    if model.is_last:
        # Every filter is on, and logits are edited: the most that a draw holds.
        sampling = SamplingParams(temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1)
        request = Request(row=0, prompt_token_ids=np.zeros(1, np.int32), sampling=sampling)
        history = History(request)
        history.advance([0])
        sample(output, SamplingBatch.of((request, position, history) for position in range(step.num_entries)))
    model.forget_expert_load()
