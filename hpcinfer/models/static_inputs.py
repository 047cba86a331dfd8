"""The inputs of decode steps at fixed addresses, so that a captured forward can be replayed on others than it was captured with.

A step of fewer entries than it was captured for is padded: a padding entry computes token 0 at position 0 and writes into page
0, which no sequence ever owns. Shape letters: N entries of the capture, B pages of the longest possible sequence, D model.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from hpcinfer.attention.metadata import AttentionMetadata
from hpcinfer.batch import MicroBatch
from hpcinfer.models.base import StageInputs, with_drawn


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StaticShape:
    """Sizes that do not change between replays."""

    max_entries: int
    """The largest N."""
    max_context: int
    """Longest sequence in tokens."""
    block_size: int
    num_lanes: int
    hidden_size: int
    """D."""
    is_first_stage: bool
    host_numbers: bool
    """The attention backend looks at host numbers too, so that its forward cannot be captured, only called again."""

    @property
    def max_blocks(self) -> int:
        """B."""
        return -(-self.max_context // self.block_size)


class StaticInputs:
    """Memory for the inputs of one decode microbatch. Steps of different N share it: each takes the first N rows.

    Args:
        shape: of the largest.
        dtype: of activations.
        device: of everything.
    """

    def __init__(self, shape: StaticShape, *, dtype: torch.dtype, device: torch.device) -> None:
        self._shape = shape
        self._device = device
        most = shape.max_entries
        # Token ids, positions and slots in one piece: they travel as one.
        self._int64 = torch.zeros(3 * most, dtype=torch.int64, device=device)
        self._seq_lens = torch.ones(most, dtype=torch.int32, device=device)
        self._valid = torch.zeros(most, dtype=torch.bool, device=device)
        self._block_tables = torch.zeros(most, shape.max_blocks, dtype=torch.int32, device=device)
        self._starts = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._rows = torch.arange(most, device=device)
        self._hidden = None
        if not shape.is_first_stage:
            self._hidden = torch.zeros(most, shape.hidden_size, dtype=dtype, device=device)

    def of(self, num_entries: int, num_rows: int) -> StageInputs:
        """The inputs of a step of N entries.

        Args:
            num_rows: P, rows of activations that this rank receives for them.
        """
        token_ids, positions, slots = self._columns(num_entries)
        ones = np.ones(num_entries, np.int64)
        width = self._shape.max_blocks if self._shape.host_numbers else 0
        metadata = AttentionMetadata(
            positions=positions, query_start_loc=self._starts[: num_entries + 1],
            seq_lens=self._seq_lens[:num_entries],
            block_tables=self._block_tables[:num_entries], slot_mapping=slots, block_size=self._shape.block_size,
            host_query_start_loc=np.arange(num_entries + 1), host_query_lens=ones, host_seq_lens=ones.copy(),
            host_block_tables=np.zeros((num_entries, width), np.int64), max_query_len=1,
            max_seq_len=self._shape.max_context, num_decodes=num_entries, is_prefill=False,
            lane_tokens=(num_entries,) * self._shape.num_lanes, shared=None, valid=self._valid[:num_entries],
        )
        return StageInputs(
            metadata=metadata, sample_indices=self._rows[:num_entries],
            token_ids=token_ids if self._shape.is_first_stage else None,
            hidden=None if self._hidden is None else self._hidden[:num_rows],
        )

    def fill(
        self,
        inputs: StageInputs,
        microbatch: MicroBatch,
        *,
        hidden: torch.Tensor | None = None,
        drawn: torch.Tensor | None = None,
    ) -> None:
        """Put a decode microbatch of at most N entries into `inputs`, which `of` has made.

        Args:
            hidden: [P or fewer, D] from the stage before.
            drawn: see `StageInputs.from_microbatch`.
        """
        metadata, count = inputs.metadata, microbatch.num_entries
        num_entries, width = metadata.num_entries, microbatch.block_tables.shape[1]
        positions = np.asarray(microbatch.context_lens, np.int64)
        tables = np.asarray(microbatch.block_tables, np.int64)
        size = self._shape.block_size
        int64, seq_lens = np.zeros((3, num_entries), np.int64), np.ones(num_entries, np.int32)
        int64[0, :count], int64[1, :count] = microbatch.token_ids, positions
        if count:
            int64[2, :count] = tables[np.arange(count), positions // size] * size + positions % size
        seq_lens[:count] = positions + 1
        self._send(int64, self._columns(num_entries))
        self._send(seq_lens, metadata.seq_lens)
        self._send(np.arange(num_entries) < count, metadata.valid)
        self._send(np.ascontiguousarray(microbatch.block_tables, np.int32), self._block_tables[:count, :width])
        self._block_tables[count:num_entries, :1] = 0
        if inputs.token_ids is not None and (microbatch.token_ids < 0).any():
            inputs.token_ids.copy_(with_drawn(inputs.token_ids, drawn))
        if hidden is not None:
            inputs.hidden[: hidden.shape[0]] = hidden
        if self._shape.host_numbers:
            metadata.host_seq_lens[:] = seq_lens
            metadata.host_block_tables[:] = 0
            metadata.host_block_tables[:count, :width] = tables
            metadata.scratch.clear()

    def _columns(self, num_entries: int) -> torch.Tensor:
        """int64 [3, N], in one piece whatever N is."""
        return self._int64[: 3 * num_entries].view(3, num_entries)

    def _send(self, values: np.ndarray, target: torch.Tensor) -> None:
        """Copy to the device without waiting for it."""
        source = torch.from_numpy(values)
        if self._device.type == "cuda":
            source = source.pin_memory()  # kept by torch until the copy is over
        target.copy_(source, non_blocking=True)
