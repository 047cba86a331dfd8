"""Tokens travel to the ranks that have their experts, and the experts' outputs back.

Two forms behind one verb, with the same numbers up to rounding:
- gathered, for decodes: every rank gets all tokens of all ranks, padded to equal buckets (all-gather), computes its own
  experts for them, and the partial outputs are added up where the tokens came from (reduce-scatter). All shapes follow
  from facts that every rank knows beforehand.
- exchanged, for prefill: a token goes once to each rank that has one of its experts (all-to-all, after one of the
  counts), and each rank's output for it comes back the same way and is added up.
No token is dropped: there is no capacity.

Shape letters: n tokens of this rank, R received rows, D model, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from hpcinfer.comm.communicator import Communicator
from hpcinfer.parallel.segments import Segments
from hpcinfer.parallel.tensor import pad_rows

Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(x [R, D], experts int64 [R, k], weights float32 [R, k]) -> [R, D]: the weighted sum over this rank's experts.
A negative expert is nobody."""

NOBODY = -1


class ExpertDispatch:
    """Dispatch and combine over the ranks of `ep`.

    Args:
        ep: the ranks over which the experts are spread.
        num_experts: E; rank r has those of expert_range(E, ranks, r).
        label: names the transfers in records and error reports.
    """

    def __init__(self, ep: Communicator, *, num_experts: int, label: str) -> None:
        self.ep = ep
        held = [end - start for start, end in (expert_range(num_experts, ep.size, rank) for rank in range(ep.size))]
        self._owner = torch.arange(ep.size, device=ep.device).repeat_interleave(torch.tensor(held, device=ep.device))
        """int64 [E]: the rank of each expert."""
        self._label = label

    def forward(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        compute: Compute,
        *,
        rows: Sequence[int],
        gathered: bool,
    ) -> Segments:
        """Send tokens, compute on the ranks that have the experts, and add up. Collective over ep, also with n = 0.

        Args:
            x: [n, D], this rank's tokens.
            ids: int64 [n, k], their experts.
            weights: float32 [n, k].
            compute: this rank's experts.
            rows: n of every rank, the same on all.
            gathered: which form; the same on all ranks. It has two transfers, the other three.

        Returns:
            [n, D] in x's dtype.
        """
        form = self._gathered if gathered else self._exchanged
        return form(x, ids, weights, compute, rows)

    def _gathered(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, compute: Compute, rows: Sequence[int]
    ) -> Segments:
        width, bucket = x.shape[1], max(rows)
        own = pad_rows(pack(x, ids, weights), bucket)
        received = yield self.ep.all_gather(own, label=f"{self._label} dispatch")
        x, ids, weights = unpack(received, width, x.dtype, weights.dtype)
        for rank, count in enumerate(rows):
            ids[rank * bucket + count : (rank + 1) * bucket] = NOBODY
        y = yield self.ep.reduce_scatter(compute(x, ids, weights), label=f"{self._label} combine")
        return y[: rows[self.ep.rank]]

    def _exchanged(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, compute: Compute, rows: Sequence[int]
    ) -> Segments:
        num_tokens, width = x.shape
        tokens, sent = self._destinations(ids)
        ones = [1] * self.ep.size
        counting = self.ep.all_to_all(
            torch.tensor(sent, dtype=torch.int64, device=x.device), ones, ones, label=f"{self._label} counts"
        )
        own = pack(x, ids, weights).index_select(0, tokens)
        counts = yield counting
        got = counts.tolist()
        received = yield self.ep.all_to_all(own, sent, got, label=f"{self._label} dispatch")
        outputs = compute(*unpack(received, width, x.dtype, weights.dtype))
        returned = yield self.ep.all_to_all(outputs, got, sent, label=f"{self._label} combine")
        total = torch.zeros(num_tokens, width, dtype=weights.dtype, device=x.device)
        return total.index_add_(0, tokens, returned.to(weights.dtype)).to(x.dtype)

    def _destinations(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Rows to send, rank 0's first and each at most once a rank: int64 [sum], and how many go to each rank."""
        wanted = torch.zeros(ids.shape[0], self.ep.size, dtype=torch.bool, device=ids.device)
        wanted.scatter_(1, self._owner[ids], True)
        tokens = wanted.t().nonzero()[:, 1]
        return tokens, wanted.sum(0).tolist()


def expert_range(num_experts: int, num_ranks: int, rank: int) -> tuple[int, int]:
    """First and one past the last expert of `rank`: as even as can be, the first ranks have one more."""
    each, more = divmod(num_experts, num_ranks)
    start = rank * each + min(rank, more)
    return start, start + each + (rank < more)


def pack(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """x [n, D], int64 ids [n, k], weights [n, k] -> uint8 [n, bytes], so that a token is one row of one transfer."""
    parts = (x, ids.to(torch.int32), weights)
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)


def unpack(
    packed: torch.Tensor, width: int, dtype: torch.dtype, weight_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse of `pack`, for x [n, width] of `dtype`."""
    wide, id_bytes = width * dtype.itemsize, torch.int32.itemsize
    k = (packed.shape[1] - wide) // (id_bytes + weight_dtype.itemsize)
    parts = packed.split([wide, k * id_bytes, k * weight_dtype.itemsize], dim=1)
    # Copies, also of a single row, whose slices count as contiguous: numbers must not begin at an odd byte.
    x, ids, weights = (part.clone(memory_format=torch.contiguous_format) for part in parts)
    return x.view(dtype), ids.view(torch.int32).long(), weights.view(weight_dtype)
