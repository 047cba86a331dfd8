"""What attention must know about a microbatch, as tensors and as host numbers.

Shape letters: T tokens, R entries of the microbatch (sequences, or runs of one), B blocks in the longest block table,
S block size, X shared tokens of all lanes together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hpcinfer.batch import MicroBatch


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SharedTokens:
    """The first tokens of every lane, whose keys and values all lanes put into their pages (sequence parallelism)."""

    lens: tuple[int, ...]
    """Number of them in each lane; an all-gather of keys and values is padded to the largest."""
    own: int
    """Number of them in this lane."""
    rows: torch.Tensor
    """int64 [X]: where they stand in the gathered [lanes * max(lens), ...]."""
    slots: torch.Tensor
    """int64 [X]: where this lane's pages take them."""


@dataclasses.dataclass(kw_only=True, slots=True)
class AttentionMetadata:
    """Where each token of a microbatch stands and where the keys and values of its sequence lie.

    The same facts are kept as host numbers, so that a backend which loops over sequences never waits for a device.
    """

    positions: torch.Tensor
    """int64 [T]: absolute position of each token in its sequence."""
    query_start_loc: torch.Tensor
    """int32 [R + 1]: tokens query_start_loc[r] to query_start_loc[r + 1] belong to sequence r."""
    seq_lens: torch.Tensor
    """int32 [R]: context and this microbatch's tokens together."""
    block_tables: torch.Tensor
    """int32 [R, B]."""
    slot_mapping: torch.Tensor
    """int64 [T]: block * S + offset in the block, where each token's key and value are written."""
    block_size: int
    """S."""
    host_query_start_loc: np.ndarray
    """int64 [R + 1]."""
    host_query_lens: np.ndarray
    """int64 [R]."""
    host_seq_lens: np.ndarray
    """int64 [R]."""
    host_block_tables: np.ndarray
    """int64 [R, B]."""
    max_query_len: int
    max_seq_len: int
    num_decodes: int
    """Sequences with one token in this microbatch."""
    is_prefill: bool
    """False where every lane of the microbatch has decodes only."""
    lane_tokens: tuple[int, ...]
    """T in every lane."""
    shared: SharedTokens | None
    """None where no lane needs keys and values of another."""
    valid: torch.Tensor | None = None
    """bool [T]: False for tokens of padding (a captured step's), which are sent to no expert. None: there is no padding."""
    scratch: dict[Any, Any] = dataclasses.field(default_factory=dict)
    """What a backend works out once for the microbatch and uses in every layer; keyed by the backend's name first."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.host_query_start_loc[-1])

    @property
    def num_entries(self) -> int:
        """R."""
        return len(self.host_query_lens)

    @property
    def only_decodes(self) -> bool:
        """Every entry has one token: token r is that of entry r."""
        return self.num_decodes == self.num_entries


def build_metadata(
    microbatch: MicroBatch, block_size: int, device: torch.device, *, lane: int = 0
) -> AttentionMetadata:
    """Work out the metadata of a microbatch.

    Args:
        microbatch: host data from the scheduler.
        block_size: S, tokens in a block.
        device: where the tensors are wanted.
        lane: of this rank.
    """
    query_lens = np.asarray(microbatch.query_lens, np.int64)
    context_lens = np.asarray(microbatch.context_lens, np.int64)
    block_tables = np.asarray(microbatch.block_tables, np.int64)
    seq_lens = context_lens + query_lens
    starts = np.zeros(len(query_lens) + 1, np.int64)
    np.cumsum(query_lens, out=starts[1:])
    sequence = np.repeat(np.arange(len(query_lens)), query_lens)
    positions = np.arange(starts[-1]) - starts[sequence] + context_lens[sequence]
    slots = token_slots(block_tables, sequence, positions, block_size)

    def tensor(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return to_device(torch.from_numpy(np.ascontiguousarray(values)).to(dtype), device)

    return AttentionMetadata(
        positions=tensor(positions, torch.int64),
        query_start_loc=tensor(starts, torch.int32),
        seq_lens=tensor(seq_lens, torch.int32),
        block_tables=tensor(block_tables, torch.int32),
        slot_mapping=tensor(slots, torch.int64),
        block_size=block_size,
        host_query_start_loc=starts,
        host_query_lens=query_lens,
        host_seq_lens=seq_lens,
        host_block_tables=block_tables,
        max_query_len=int(query_lens.max(initial=0)),
        max_seq_len=int(seq_lens.max(initial=0)),
        num_decodes=int((query_lens == 1).sum()),
        is_prefill=microbatch.is_prefill,
        lane_tokens=microbatch.lane_tokens,
        shared=_shared_tokens(microbatch, lane, tensor),
    )


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on `device`. The host does not wait for the copy to a GPU, nor for what the GPU is doing."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # torch keeps the pinned memory until the copy is over


def _shared_tokens(
    microbatch: MicroBatch, lane: int, tensor: Callable[[np.ndarray, torch.dtype], torch.Tensor]
) -> SharedTokens | None:
    lens = microbatch.shared_lens
    if not any(lens):
        return None
    rows = np.concatenate([index * max(lens) + np.arange(count) for index, count in enumerate(lens)])
    return SharedTokens(
        lens=lens, own=lens[lane], rows=tensor(rows, torch.int64), slots=tensor(microbatch.shared_slots, torch.int64)
    )


def token_slots(
    block_tables: np.ndarray, sequence: np.ndarray, positions: np.ndarray, block_size: int
) -> np.ndarray:
    """Slot (block * block_size + offset) of each (sequence, position); the two arrays broadcast against each other."""
    return block_tables[sequence, positions // block_size] * block_size + positions % block_size
