"""Positions, slots and lengths of a microbatch."""

from __future__ import annotations

import numpy as np
import torch

from hpcinfer.attention.metadata import build_metadata
from hpcinfer.batch import MicroBatch


def test_positions_and_slots():
    microbatch = MicroBatch(
        tick=3, sequence_ids=(7, 9, 4), token_ids=np.arange(7, dtype=np.int32),
        query_lens=np.array([4, 1, 2], np.int32), context_lens=np.array([0, 5, 3], np.int32),
        block_tables=np.array([[2, 0], [5, 1], [4, 3]], np.int32), samples=np.array([True, True, False]),
    )
    metadata = build_metadata(microbatch, 4, torch.device("cpu"))
    assert metadata.positions.tolist() == [0, 1, 2, 3, 5, 3, 4]
    assert metadata.slot_mapping.tolist() == [8, 9, 10, 11, 5, 19, 12]
    assert metadata.query_start_loc.tolist() == [0, 4, 5, 7]
    assert metadata.seq_lens.tolist() == [4, 6, 5]
    assert metadata.block_tables.tolist() == [[2, 0], [5, 1], [4, 3]]
    assert (metadata.max_query_len, metadata.max_seq_len, metadata.num_decodes) == (4, 6, 1)
    assert (metadata.num_tokens, metadata.num_entries) == (7, 3)
    assert [metadata.positions.dtype, metadata.slot_mapping.dtype] == [torch.int64] * 2
    assert [metadata.query_start_loc.dtype, metadata.seq_lens.dtype, metadata.block_tables.dtype] == [torch.int32] * 3
