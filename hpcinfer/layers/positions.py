"""Learned position embedding (Radford et al. 2019).

Shape letters: T tokens, L positions, D model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hpcinfer.comm.communicator import Communicator
from hpcinfer.layers.shard import check_shape


class LearnedPositions:
    """One vector a position, added to the token embedding.

    Rank 0 alone has them and adds them before the embedding's reduction, as a row-parallel layer does with its bias: in
    either form of the residual stream every token gets its vector once, and the sum of two numbers and zeros is
    rounded once.

    Args:
        num_positions: L; positions are 0 to L - 1.
        hidden_size: D.
        tp: communicator of the tensor-parallel axis.
        dtype, device: of the weight.
    """

    def __init__(
        self, num_positions: int, hidden_size: int, *, tp: Communicator, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._shape = (num_positions, hidden_size)
        self.weight = torch.zeros(self._shape, dtype=dtype, device=device) if tp.rank == 0 else None

    def load_weight(self, full: torch.Tensor) -> None:
        """Take the weight [L, D] on rank 0; the other ranks drop it."""
        check_shape(full, self._shape, "position embedding weight")
        if self.weight is not None:
            self.weight.copy_(full)

    def forward(self, positions: torch.Tensor) -> torch.Tensor | None:
        """positions int64 [T] -> [T, D] on rank 0, None on the others."""
        return None if self.weight is None else F.embedding(positions, self.weight)
