"""Decode steps that are captured once and replayed: the host then launches one graph instead of hundreds of kernels.

A step is captured for numbers of entries (buckets) and padded to the next larger one. Captured are the forwards of all its
microbatches, taking turns, with their transfers inside the stage. What travels between stages stays outside, and so does
prefill. All ranks of a stage capture and replay the same buckets in the same order.

What a graph is, is an argument: on a GPU a CUDA graph, in tests something that calls the forward again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from hpcinfer.batch import MicroBatch
from hpcinfer.kvcache.pool import KvPool
from hpcinfer.models.base import StageInputs, StageModel
from hpcinfer.models.static_inputs import StaticInputs, StaticShape
from hpcinfer.parallel.tensor import ShardedStream
from hpcinfer.pipeline.schedule import interleave

_WARMUPS = 2


class Graph(Protocol):
    """Something that can be done again."""

    def capture(self, function: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        """Do it once. Returns tensors that hold its results, and those of every replay."""

    def replay(self) -> None:
        """Do it again, on whatever its inputs hold now."""


class CudaGraph:
    """A CUDA graph. Those that share a pool share the memory of their intermediate results.

    Args:
        pool: of torch.cuda.graph_pool_handle().
    """

    def __init__(self, pool: tuple[int, int]) -> None:
        self._pool = pool
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, function: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        torch.cuda.synchronize()
        # Other threads go on to ask for events: only this one's calls are captured, and restricted.
        with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
            return function()

    def replay(self) -> None:
        self._graph.replay()


@dataclasses.dataclass(kw_only=True, slots=True)
class _Captured:
    """One capture."""

    graph: Graph
    inputs: list[StageInputs]
    outputs: list[torch.Tensor]


class DecodeGraphs:
    """The captured decode steps of one stage on one rank.

    Args:
        model, kv: of the stage, with weights and pages.
        make_graph: a new graph.
        buckets: numbers of entries of a microbatch, ascending.
        max_context: longest sequence.
        max_parts: microbatches of a step: 1, or 2 where decode steps are divided.
    """

    def __init__(
        self,
        model: StageModel,
        kv: KvPool,
        *,
        make_graph: Callable[[], Graph],
        buckets: Sequence[int],
        max_context: int,
        max_parts: int = 1,
    ) -> None:
        self._model = model
        self._kv = kv
        self._make_graph = make_graph
        self.buckets = tuple(buckets)
        self._shape = StaticShape(
            max_entries=self.buckets[-1], max_context=max_context, block_size=kv.layout.block_size,
            num_lanes=model.axes.sp.size, hidden_size=model.config.hidden_size, is_first_stage=model.is_first,
            host_numbers=not model.backend.capturable,
        )
        # Token shards of a padded step are others than those of the step, which is what the other stages expect.
        self._shards_travel = isinstance(model.stream, ShardedStream) and not (model.is_first and model.is_last)
        self._memory = [StaticInputs(self._shape, dtype=model.dtype, device=model.device) for _ in range(max_parts)]
        self._captured: dict[tuple[int, ...], _Captured] = {}
        self.replays = 0
        """Steps that were replayed."""

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture all buckets, the largest first, so that the others fit into its memory. Collective over the stage."""
        for num_parts in range(1, len(self._memory) + 1):
            for bucket in reversed(self.buckets):
                self._capture((bucket,) * num_parts)

    def key_of(self, parts: Sequence[MicroBatch]) -> tuple[int, ...] | None:
        """The capture that serves a step; None where there is none. The same on all ranks that compute together."""
        if len(parts) > len(self._memory) or self._shards_travel or any(part.is_prefill for part in parts):
            return None
        spans_lanes = self._model.axes.ep_spans_lanes
        most = max(max(part.lane_tokens) if spans_lanes else part.num_tokens for part in parts)
        bucket = next((bucket for bucket in self.buckets if bucket >= most), None)
        return None if bucket is None else (bucket,) * len(parts)

    @torch.inference_mode()
    def run(
        self,
        key: tuple[int, ...],
        parts: Sequence[MicroBatch],
        hidden: Sequence[torch.Tensor | None],
        drawn: torch.Tensor | None,
    ) -> list[torch.Tensor]:
        """Replay a step.

        Args:
            key: of `key_of(parts)`.
            hidden: what each part has received from the stage before.
            drawn: see `StageInputs.from_microbatch`.

        Returns:
            Of each part its logits or activations, [T, V] or [T, D], in memory that the next replay overwrites.
        """
        captured = self._captured[key]
        for memory, inputs, part, received in zip(self._memory, captured.inputs, parts, hidden, strict=False):
            memory.fill(inputs, part, hidden=received, drawn=drawn)
        captured.graph.replay()
        self.replays += 1
        return [output[: part.num_tokens] for output, part in zip(captured.outputs, parts, strict=True)]

    def close(self) -> None:
        """Let go of all graphs: communicators whose operations are in one cannot be destroyed before."""
        self._captured.clear()

    def _capture(self, key: tuple[int, ...]) -> None:
        rows = [self._model.stream.num_rows(bucket) for bucket in key]
        inputs = [memory.of(bucket, n) for memory, bucket, n in zip(self._memory, key, rows, strict=False)]

        def forward() -> list[torch.Tensor]:
            for each in inputs:
                each.metadata.scratch.clear()  # what is worked out from lengths belongs into the capture
            return interleave([self._model.forward(each, self._kv) for each in inputs])

        for _ in range(_WARMUPS):  # kernels are compiled and connections made before anything is captured
            forward()
        graph = self._make_graph()
        self._captured[key] = _Captured(graph=graph, inputs=inputs, outputs=graph.capture(forward))


def decode_buckets(most: int) -> list[int]:
    """Numbers of entries to capture for, up to `most`: every one up to 4, then steps of an eighth or so, so that padding costs at
    most about that much."""
    buckets = [*range(1, 5), *range(8, 64, 8), *range(64, 256, 16), *range(256, most + 1, 32)]
    return [bucket for bucket in buckets if bucket < most] + [most]
