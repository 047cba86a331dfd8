"""The pages themselves: one key and one value tensor for each layer of this stage."""

from __future__ import annotations

import torch

from hpcinfer.kvcache.layout import KvLayout


class KvPool:
    """Keys and values of `num_blocks` blocks in every layer that this rank holds.

    Memory is written at once (zeros), so that a pool too large for the machine fails here and not in mid-run. Block
    numbers come from the scheduler's block manager; the pool knows nothing of sequences.

    Args:
        layout: what the attention backend reads and writes.
        num_layers: layers of this stage.
        num_blocks: B, the same on every rank of the replica.
        dtype, device: of the pages.
    """

    def __init__(
        self, layout: KvLayout, *, num_layers: int, num_blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        shape = layout.shape(num_blocks)
        self._pages = [
            (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
            for _ in range(num_layers)
        ]

    @property
    def num_layers(self) -> int:
        return len(self._pages)

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages."""
        return sum(k.nbytes + v.nbytes for k, v in self._pages)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value pages, in the layout's shape, of the stage's layer `index` (0 is the first of this stage)."""
        return self._pages[index]
