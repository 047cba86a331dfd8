"""Linear layers split over the ranks of the tensor-parallel axis (Shoeybi et al. 2019, Megatron-LM).

Weights are [out, in] as in checkpoints. A column-parallel layer splits `out` and needs no communication; a row-parallel
layer splits `in` and ends in a sum over the ranks. Each class states which dim it splits and loads its own shard from the full
tensor. Sizes that the ranks do not divide are padded with zeros, heads excepted.

Shape letters: T tokens, D width in, H head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hpcinfer.comm.communicator import Communicator
from hpcinfer.config.model import heads_per_rank
from hpcinfer.parallel.segments import Segments
from hpcinfer.parallel.tensor import TokenStream
from hpcinfer.layers.shard import check_shape, copy_shard, part_range, part_size


class MergedColumnParallelLinear:
    """Several matrices on the same input as one matmul; each one's output features are split over the ranks.

    Args:
        in_features: D.
        out_features: whole output sizes, in the order of the merged output (gate and up, for example).
        bias: whether all of them have one.
        tp: communicator of the tensor-parallel axis.
        dtype, device: of the weights.
    """

    split_dim = 0

    def __init__(
        self,
        in_features: int,
        out_features: tuple[int, ...],
        *,
        bias: bool,
        tp: Communicator,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.shard_sizes = tuple(part_size(size, tp.size) for size in out_features)
        """Output features of each matrix on this rank, padding included."""
        self._ranges = tuple(part_range(size, tp.size, tp.rank) for size in out_features)
        rows = sum(self.shard_sizes)
        self.weight = torch.zeros(rows, in_features, dtype=dtype, device=device)
        self.bias = torch.zeros(rows, dtype=dtype, device=device) if bias else None

    def load_weight(self, full: torch.Tensor, part: int = 0) -> None:
        """Take this rank's rows of matrix `part` from its full weight [out_features[part], D]."""
        check_shape(full, (self.out_features[part], self.in_features), "weight")
        self._copy(self.weight, full, part)

    def load_bias(self, full: torch.Tensor, part: int = 0) -> None:
        """Take this rank's entries of the bias of matrix `part` from the full one [out_features[part]]."""
        check_shape(full, (self.out_features[part],), "bias")
        self._copy(self.bias, full, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, D] -> [T, sum(shard_sizes)]."""
        return F.linear(x, self.weight, self.bias)

    def _copy(self, merged: torch.Tensor, full: torch.Tensor, part: int) -> None:
        shard = merged.narrow(0, sum(self.shard_sizes[:part]), self.shard_sizes[part])
        copy_shard(shard, full, self.split_dim, *self._ranges[part])


class ColumnParallelLinear(MergedColumnParallelLinear):
    """One matrix whose output features are split over the ranks. Arguments as of the merged layer, with one size."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        tp: Communicator,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(in_features, (out_features,), bias=bias, tp=tp, dtype=dtype, device=device)


class QkvParallelLinear:
    """Query, key and value projections as one matmul, split by heads.

    Query heads are split evenly. Key/value heads are too, or, where there are more ranks than heads, each is kept by
    several neighbouring ranks, namely those whose query heads use it.

    Raises:
        ConfigError: the heads do not divide over the ranks.
    """

    split_dim = 0
    PARTS = ("q", "k", "v")

    def __init__(
        self,
        in_features: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool,
        tp: Communicator,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.in_features = in_features
        self.head_dim = head_dim
        self.num_heads, self.num_kv_heads = heads_per_rank(num_heads, num_kv_heads, tp.size)
        """N and K of this rank."""
        kv_start = tp.rank * num_kv_heads // tp.size
        # part -> (whole heads, first head of this rank, heads of this rank, first head in the merged output)
        self._parts = {
            "q": (num_heads, tp.rank * self.num_heads, self.num_heads, 0),
            "k": (num_kv_heads, kv_start, self.num_kv_heads, self.num_heads),
            "v": (num_kv_heads, kv_start, self.num_kv_heads, self.num_heads + self.num_kv_heads),
        }
        rows = (self.num_heads + 2 * self.num_kv_heads) * head_dim
        self.weight = torch.zeros(rows, in_features, dtype=dtype, device=device)
        self.bias = torch.zeros(rows, dtype=dtype, device=device) if bias else None

    def load_weight(self, full: torch.Tensor, part: str) -> None:
        """Take this rank's heads from the full weight [heads * H, D] of `part`: "q", "k" or "v"."""
        check_shape(full, (self._parts[part][0] * self.head_dim, self.in_features), "weight")
        self._copy(self.weight, full, part)

    def load_bias(self, full: torch.Tensor, part: str) -> None:
        """Take this rank's heads from the full bias [heads * H] of `part`."""
        check_shape(full, (self._parts[part][0] * self.head_dim,), "bias")
        self._copy(self.bias, full, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, D] -> [T, N + 2K, H]: query heads, then key heads, then value heads."""
        return self._project(x, slice(None))

    def forward_q(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, D] -> [T, N, H]: the query heads alone."""
        return self._project(x, slice(0, self.num_heads * self.head_dim))

    def forward_kv(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, D] -> [T, 2K, H]: key heads, then value heads."""
        return self._project(x, slice(self.num_heads * self.head_dim, None))

    def _project(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        bias = None if self.bias is None else self.bias[rows]
        weight = self.weight[rows]
        return F.linear(x, weight, bias).view(x.shape[0], weight.shape[0] // self.head_dim, self.head_dim)

    def _copy(self, merged: torch.Tensor, full: torch.Tensor, part: str) -> None:
        _, first, count, offset = self._parts[part]
        shard = merged.narrow(0, offset * self.head_dim, count * self.head_dim)
        copy_shard(shard, full, self.split_dim, first * self.head_dim, (first + count) * self.head_dim)


class RowParallelLinear:
    """A matrix whose input features are split over the ranks; the partial outputs are summed as the stream's form says.

    Args:
        in_features: whole input size; the input of `forward` is this rank's part of it.
        out_features: D, not split.
        bias: whether there is one; only rank 0 adds it, so that the sum has it once.
        stream: of the stage; its ranks are those that the matrix is split over.
        dtype, device: of the weights.
        label: names the transfer in records and error reports.
    """

    split_dim = 1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        stream: TokenStream,
        dtype: torch.dtype,
        device: torch.device,
        label: str = "",
    ) -> None:
        tp = stream.tp
        self.in_features = in_features
        self.out_features = out_features
        self.label = label
        self._stream = stream
        self._range = part_range(in_features, tp.size, tp.rank)
        self.weight = torch.zeros(out_features, part_size(in_features, tp.size), dtype=dtype, device=device)
        self.bias = torch.zeros(out_features, dtype=dtype, device=device) if bias and tp.rank == 0 else None

    def load_weight(self, full: torch.Tensor) -> None:
        """Take this rank's columns of the full weight [D, in_features]."""
        check_shape(full, (self.out_features, self.in_features), "weight")
        copy_shard(self.weight, full, self.split_dim, *self._range)

    def load_bias(self, full: torch.Tensor) -> None:
        """Take the bias [D] on rank 0; the other ranks drop it."""
        check_shape(full, (self.out_features,), "bias")
        if self.bias is not None:
            self.bias.copy_(full)

    def forward(self, x: torch.Tensor) -> Segments:
        """x [T, in_features / ranks] -> [P, D], this rank's part of the stream. Collective: one reduction over tp."""
        y = yield from self._stream.reduce(self._product(x), label=self.label)
        return y

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        """Partial sums [T, D], straight in the memory that the reduction works on where there is such."""
        out = self._stream.memory(x.shape[0], self.out_features, x.dtype)
        if out is None:
            return F.linear(x, self.weight, self.bias)
        if self.bias is None:
            return torch.mm(x, self.weight.t(), out=out)
        return torch.addmm(self.bias, x, self.weight.t(), out=out)
