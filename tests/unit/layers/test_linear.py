"""Shards of the parallel linear layers put together equal the whole layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hpcinfer.comm.local import LocalCommunicator
from hpcinfer.errors import CheckpointError, ConfigError
from hpcinfer.layers.linear import (
    ColumnParallelLinear, MergedColumnParallelLinear, QkvParallelLinear, RowParallelLinear
)
from hpcinfer.parallel.tensor import ReplicatedStream
from tests.unit.layers.lockstep import LockstepCommunicator, run_lockstep

DOUBLE = {"dtype": torch.float64, "device": torch.device("cpu")}
RANKS = [1, 2, 3, 4, 7]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [12, 13, 5, 1])
@pytest.mark.parametrize("tp", RANKS)
def test_column_then_row(tp, size):
    """A column-parallel layer feeds a row-parallel one; the bias of the second is added once."""
    x, w1, b1, w2, b2 = random(5, 6), random(size, 6), random(size), random(4, size), random(4)
    forwards = []
    for rank in range(tp):
        comm = LocalCommunicator("tp") if tp == 1 else LockstepCommunicator(rank, tp)
        column = ColumnParallelLinear(6, size, bias=True, tp=comm, **DOUBLE)
        row = RowParallelLinear(size, 4, bias=True, stream=ReplicatedStream(comm), **DOUBLE)
        column.load_weight(w1), column.load_bias(b1), row.load_weight(w2), row.load_bias(b2)
        forwards.append(row.forward(column.forward(x)))
    wanted = F.linear(F.linear(x, w1, b1), w2, b2)
    for result in run_lockstep(forwards):
        torch.testing.assert_close(result, wanted)


@pytest.mark.parametrize("tp", [2, 3])
def test_merged_parts_stay_apart(tp):
    x, gate, up = random(5, 6), random(11, 6, seed=1), random(7, 6, seed=2)
    parts = [[], []]
    for rank in range(tp):
        layer = MergedColumnParallelLinear(6, (11, 7), bias=False, tp=LockstepCommunicator(rank, tp), **DOUBLE)
        layer.load_weight(up, 1), layer.load_weight(gate, 0)
        for part, y in zip(parts, layer.forward(x).split(layer.shard_sizes, dim=-1)):
            part.append(y)
    for part, weight in zip(parts, (gate, up)):
        joined = torch.cat(part, dim=-1)
        torch.testing.assert_close(joined[:, : len(weight)], F.linear(x, weight))
        assert not joined[:, len(weight) :].any()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp"), [(8, 2, 2), (8, 2, 4), (8, 2, 8), (6, 3, 3), (4, 1, 4), (12, 4, 12)]
)
def test_qkv_heads(heads, kv_heads, tp):
    """Every query head is on one rank, together with the key/value head that it uses."""
    dim, hidden = 3, 6
    x = random(5, hidden)
    full = {"q": (random(heads * dim, hidden, seed=1), random(heads * dim, seed=2))}
    full["k"] = (random(kv_heads * dim, hidden, seed=3), random(kv_heads * dim, seed=4))
    full["v"] = (random(kv_heads * dim, hidden, seed=5), random(kv_heads * dim, seed=6))
    whole = {part: F.linear(x, *full[part]).view(5, -1, dim) for part in full}
    for rank in range(tp):
        layer = QkvParallelLinear(
            hidden, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, bias=True,
            tp=LockstepCommunicator(rank, tp), **DOUBLE,
        )
        for part, (weight, bias) in full.items():
            layer.load_weight(weight, part), layer.load_bias(bias, part)
        q, k, v = layer.forward(x).split((layer.num_heads, layer.num_kv_heads, layer.num_kv_heads), dim=1)
        for local in range(layer.num_heads):
            head = rank * layer.num_heads + local
            kv_head, local_kv = head * kv_heads // heads, local * layer.num_kv_heads // layer.num_heads
            torch.testing.assert_close(q[:, local], whole["q"][:, head])
            torch.testing.assert_close(k[:, local_kv], whole["k"][:, kv_head])
            torch.testing.assert_close(v[:, local_kv], whole["v"][:, kv_head])


def test_heads_that_do_not_divide():
    with pytest.raises(ConfigError, match="tp = 3"):
        QkvParallelLinear(
            6, num_heads=8, num_kv_heads=2, head_dim=2, bias=False, tp=LockstepCommunicator(0, 3), **DOUBLE
        )


def test_wrong_shapes_are_refused():
    comm = LockstepCommunicator(0, 2)
    with pytest.raises(CheckpointError, match=r"(?s)\(4, 6\), expected \(5, 6\)"):
        ColumnParallelLinear(6, 5, bias=False, tp=comm, **DOUBLE).load_weight(random(4, 6))
    with pytest.raises(CheckpointError, match=r"\(5, 5\), expected \(5, 6\)"):
        RowParallelLinear(6, 5, bias=False, stream=ReplicatedStream(comm), **DOUBLE).load_weight(random(5, 5))


def test_loading_casts():
    layer = ColumnParallelLinear(
        6, 5, bias=False, tp=LockstepCommunicator(1, 2), dtype=torch.bfloat16, device=torch.device("cpu")
    )
    full = random(5, 6)
    layer.load_weight(full)
    assert torch.equal(layer.weight[:2], full[3:].bfloat16()) and not layer.weight[2].any()
