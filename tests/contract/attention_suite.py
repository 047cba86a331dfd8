"""What every attention backend is held to: it computes what the naive one computes in float64.

Pages lie in random order, unused slots hold NaN, and fresh memory is filled with NaN, so that an output that is not
written or a slot that must not be read shows. Tolerances: rounding of probabilities and output in the dtype (half an
ulp is 2**-24, 2**-11, 2**-8 of values up to 4), times the few roundings on the way.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from hpcinfer.attention.base import AttentionBackend, AttentionQuery, AttentionSpec
from hpcinfer.attention.metadata import AttentionMetadata, build_metadata
from hpcinfer.attention.naive import NaiveBackend
from hpcinfer.attention.registry import BACKENDS
from hpcinfer.batch import MicroBatch

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
HEAD_SIZES = (32, 64, 80, 96, 128, 160, 192, 224, 256)
HEAD_RATIOS = ((1, 1), (4, 4), (4, 2), (6, 2), (8, 2), (5, 1), (6, 1), (14, 2), (8, 1))

# name -> (query lengths, context lengths) of the entries of a microbatch
BATCHES = {
    "empty": ([], []),
    "one token": ([1], [0]),
    "prefill": ([17], [0]),
    "ragged prefill": ([3, 1, 40, 8], [0, 0, 0, 0]),
    "chunks": ([5, 16, 2], [16, 3, 31]),
    "decode": ([1] * 6, [15, 16, 17, 3, 0, 70]),
    "uneven decode": ([1] * 5, [300, 1, 299, 2, 150]),
    "mixed": ([1, 9, 1, 1, 12, 1], [20, 0, 33, 0, 18, 64]),
    "nothing to do for one": ([1, 0, 4], [8, 5, 0]),
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where a backend runs, and what it is told of that place."""

    device: torch.device = torch.device("cpu")
    device_type: str = "cpu"
    capability: tuple[int, int] | None = None
    cuda_version: tuple[int, int] | None = None
    packages: frozenset[str] = frozenset()
    tolerances: dict[torch.dtype, float] = dataclasses.field(default_factory=lambda: TOLERANCES)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a backend and of the reference on the same numbers."""

    batch: str = "mixed"
    backend: str = "SDPA"
    dtype: torch.dtype = torch.float32
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    seed: int = 0
    lens: tuple[list[int], list[int]] | None = None
    """Query and context lengths that are not of a batch by name."""

    def query(self, machine: Machine) -> AttentionQuery:
        return AttentionQuery(
            device_type=machine.device_type, capability=machine.capability, cuda_version=machine.cuda_version,
            packages=machine.packages, dtype=self.dtype, head_dim=self.head_dim, num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads, block_size=self.block_size, sliding_window=self.window is not None,
            softcap=self.softcap is not None, sinks=self.sinks,
        )

    def microbatch(self) -> MicroBatch:
        query_lens, context_lens = (np.array(lens, np.int32) for lens in self.lens or BATCHES[self.batch])
        needed = -(-(query_lens + context_lens) // self.block_size)
        order = np.random.default_rng(self.seed).permutation(self.num_blocks(needed) - 1) + 1
        tables = np.zeros((len(needed), int(needed.max(initial=0))), np.int32)
        for r, (n, start) in enumerate(zip(needed, np.cumsum(needed) - needed)):
            tables[r, :n] = order[start : start + n]
        return MicroBatch(
            tick=0, sequence_ids=tuple(range(len(needed))), token_ids=np.zeros(query_lens.sum(), np.int32),
            query_lens=query_lens, context_lens=context_lens, block_tables=tables,
            samples=np.ones(len(needed), bool),
        )

    @staticmethod
    def num_blocks(needed: np.ndarray) -> int:
        """Twice what is used and some; page 0 belongs to nobody."""
        return 2 * int(needed.sum()) + 4

    def spec(self, dtype: torch.dtype, device: torch.device) -> AttentionSpec:
        # From a sink that changes next to nothing to one that takes nearly all.
        sinks = torch.linspace(-4, 6, self.num_heads).to(self.dtype).to(device, dtype) if self.sinks else None
        return AttentionSpec(
            num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim,
            scale=self.head_dim**-0.5, sliding_window=self.window, softcap=self.softcap, sinks=sinks,
        )


@dataclasses.dataclass
class Inputs:
    """A case's tensors, with the pages filled by the backend itself."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    metadata: AttentionMetadata
    spec: AttentionSpec

    @classmethod
    def of(cls, case: Case, backend: AttentionBackend, device: torch.device, dtype: torch.dtype) -> Inputs:
        """The same numbers, of the case's dtype, for every backend, device and dtype."""
        microbatch = case.microbatch()
        generator = torch.Generator().manual_seed(case.seed)
        total = int((microbatch.query_lens + microbatch.context_lens).sum())
        kv = torch.randn(2, total, case.num_kv_heads, case.head_dim, generator=generator).to(case.dtype).to(device, dtype)
        merged = torch.randn(microbatch.num_tokens, case.num_heads + 1, case.head_dim, generator=generator)
        q = merged.to(case.dtype).to(device, dtype)[:, : case.num_heads]  # strided, as a slice of a merged projection is
        layout = backend.kv_layout(case.block_size, case.num_kv_heads, case.head_dim)
        needed = -(-(microbatch.query_lens + microbatch.context_lens) // case.block_size)
        k_cache, v_cache = (
            torch.full(layout.shape(case.num_blocks(needed)), float("nan"), dtype=dtype, device=device) for _ in range(2)
        )
        lens, context = microbatch.query_lens.tolist(), microbatch.context_lens.tolist()
        parts = [part.split([n for pair in zip(context, lens) for n in pair]) for part in kv] if lens else []
        if any(context):
            # What earlier microbatches wrote.
            past = dataclasses.replace(
                microbatch, token_ids=np.zeros(sum(context), np.int32),
                query_lens=microbatch.context_lens, context_lens=np.zeros_like(microbatch.context_lens),
            )
            old = [torch.cat(part[0::2]) for part in parts]
            backend.write(*old, k_cache, v_cache, build_metadata(past, case.block_size, device).slot_mapping)
        k, v = (torch.cat(part[1::2]) for part in parts) if lens else kv
        metadata = build_metadata(microbatch, case.block_size, device)
        backend.write(k, v, k_cache, v_cache, metadata.slot_mapping)
        return cls(q, k, v, k_cache, v_cache, metadata, case.spec(dtype, device))

    def forward(self, backend: AttentionBackend) -> torch.Tensor:
        return backend.forward(self.q, self.k, self.v, self.k_cache, self.v_cache, self.metadata, self.spec)


def check(case: Case, machine: Machine = Machine()) -> None:
    """Compare, or skip with the backend's reason. A second layer uses what the first left in the metadata's scratch and in the
    backend's buffers."""
    query, backend = case.query(machine), BACKENDS[case.backend]()
    reason = backend.refuses(query)
    if reason is not None:
        pytest.skip(f"{case.backend} refuses: {reason}")
    backend.prepare(query)
    with poisoned_memory():
        inputs = Inputs.of(case, backend, machine.device, case.dtype)
        first, second = inputs.forward(backend), inputs.forward(backend)
    assert torch.equal(first, second)
    assert second.is_contiguous() and second.dtype == case.dtype
    torch.testing.assert_close(second.double().cpu(), reference(case), rtol=0, atol=machine.tolerances[case.dtype])


def forget_host(metadata: AttentionMetadata) -> None:
    """Take away what the host knows of single sequences: a step that is captured once runs with other ones."""
    metadata.host_seq_lens = metadata.host_block_tables = metadata.host_query_start_loc = None


def reference(case: Case) -> torch.Tensor:
    """[T, N, H] of the naive backend in float64, from the same numbers."""
    naive = NaiveBackend()
    return Inputs.of(case, naive, torch.device("cpu"), torch.float64).forward(naive)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
