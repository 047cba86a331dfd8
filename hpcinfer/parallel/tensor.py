"""How the residual stream of a microbatch lies on the tensor-parallel ranks, and the transfers that follow from it.

Two forms compute the same numbers (Korthikanti et al. 2022, "Reducing activation recomputation"):
- replicated: every rank has all tokens; partial sums end in an all-reduce.
- sharded (the sequence form): rank r has tokens r * ceil(T / n) and on, for residual adds and norms; a layer gathers all
  tokens before its column-parallel matrices and ends in a reduce-scatter of the partial sums.

Methods that communicate are generators (see `parallel.segments`). Shape letters: T tokens in the microbatch, P of them on
this rank (T or ceil(T / n), padded with zeros), D model, n tp ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from hpcinfer.comm.communicator import Communicator
from hpcinfer.parallel.axes import StageAxes
from hpcinfer.parallel.segments import Segments


class TokenStream(ABC):
    """The residual stream over the ranks of `tp`."""

    def __init__(self, tp: Communicator) -> None:
        self.tp = tp

    @abstractmethod
    def num_rows(self, num_tokens: int) -> int:
        """P for T tokens: rows that each rank holds and that a stage sends to the next."""

    @abstractmethod
    def gather(self, x: torch.Tensor, num_tokens: int, *, label: str) -> Segments:
        """x [P, D], this rank's part -> [T, D], all tokens."""

    @abstractmethod
    def reduce(self, partial: torch.Tensor, *, label: str) -> Segments:
        """Partial sums [T, D] of every rank -> this rank's part [P, D] of their sum. Collective over tp."""

    def memory(self, num_tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Where partial sums [T, D] that go into `reduce` next are best computed; None: anywhere."""
        return None

    @abstractmethod
    def select(self, x: torch.Tensor, rows: torch.Tensor, num_tokens: int, *, label: str) -> Segments:
        """x [P, D], int64 rows [S] out of T -> [S, D] on every rank."""

    @abstractmethod
    def shard(self, x: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """This rank's share of the tokens of x [P, D] -> [ceil(T / n), D], the last ranks' padded with zeros."""

    @abstractmethod
    def unshard(self, x: torch.Tensor, num_tokens: int, *, label: str) -> Segments:
        """The inverse of `shard`, with each rank's own share [ceil(T / n), D] -> [P, D]."""


class ReplicatedStream(TokenStream):
    """Every rank has all tokens."""

    def num_rows(self, num_tokens: int) -> int:
        return num_tokens

    def gather(self, x: torch.Tensor, num_tokens: int, *, label: str) -> Segments:
        return x
        yield

    def memory(self, num_tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor | None:
        return self.tp.memory((num_tokens, width), dtype)

    def reduce(self, partial: torch.Tensor, *, label: str) -> Segments:
        total = yield self.tp.all_reduce(partial, label=label)
        return total

    def select(self, x: torch.Tensor, rows: torch.Tensor, num_tokens: int, *, label: str) -> Segments:
        return x[rows]
        yield

    def shard(self, x: torch.Tensor, num_tokens: int) -> torch.Tensor:
        rows = shard_rows(num_tokens, self.tp.size)
        padded = pad_rows(x, rows * self.tp.size)
        return padded[self.tp.rank * rows : (self.tp.rank + 1) * rows]

    def unshard(self, x: torch.Tensor, num_tokens: int, *, label: str) -> Segments:
        if self.tp.size == 1:
            return x
        gathered = yield self.tp.all_gather(x, label=label)
        return gathered[:num_tokens]


class ShardedStream(TokenStream):
    """Rank r has rows r * P to (r + 1) * P of the T tokens padded to n * P, P = ceil(T / n)."""

    def num_rows(self, num_tokens: int) -> int:
        return shard_rows(num_tokens, self.tp.size)

    def gather(self, x: torch.Tensor, num_tokens: int, *, label: str) -> Segments:
        gathered = yield self.tp.all_gather(x.contiguous(), label=f"{label} gather")
        return gathered[:num_tokens]

    def reduce(self, partial: torch.Tensor, *, label: str) -> Segments:
        rows = shard_rows(partial.shape[0], self.tp.size)
        total = yield self.tp.reduce_scatter(pad_rows(partial, rows * self.tp.size), label=label)
        return total

    def select(self, x: torch.Tensor, rows: torch.Tensor, num_tokens: int, *, label: str) -> Segments:
        if not len(rows):  # the same on all ranks
            return x.new_empty((0, x.shape[1]))
        gathered = yield from self.gather(x, num_tokens, label=label)
        return gathered[rows]

    def shard(self, x: torch.Tensor, num_tokens: int) -> torch.Tensor:
        return x

    def unshard(self, x: torch.Tensor, num_tokens: int, *, label: str) -> Segments:
        return x
        yield


def token_stream(axes: StageAxes) -> TokenStream:
    """The form that `axes` asks for; with one tp rank both are the same and the replicated one is taken."""
    return ShardedStream(axes.tp) if axes.sequence_form and axes.tp.size > 1 else ReplicatedStream(axes.tp)


def shard_rows(num_tokens: int, num_ranks: int) -> int:
    """ceil(T / n): rows of each rank's share, padding included."""
    return -(-num_tokens // num_ranks)


def pad_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    """x [T, ...] with zero rows appended up to `rows`; x itself where it has them."""
    if x.shape[0] == rows:
        return x.contiguous()
    padded = x.new_zeros((rows, *x.shape[1:]))
    padded[: x.shape[0]] = x
    return padded
