"""Splitting layers into stages so that the slowest stage is as fast as can be."""

from __future__ import annotations

from collections.abc import Sequence


def split_layers(
    costs: Sequence[float], num_stages: int, *, first_extra: float = 0.0, last_extra: float = 0.0
) -> list[range]:
    """Contiguous ranges of layers, at least one each, that minimise the largest stage cost.

    Among equal splits the earlier stages get more layers, as the last one also holds the head.

    Args:
        costs: cost of each layer, any unit.
        num_stages: from 1 to the number of layers.
        first_extra, last_extra: what the first and the last stage compute beside their layers (embedding, head), in the same
            unit.
    """
    prefix = [first_extra]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    num_layers = len(costs)
    # best[stage][end]: (largest cost, start) when stages 0..stage hold layers 0..end; dynamic programming.
    best: list[dict[int, tuple[float, int]]] = [{end: (prefix[end], 0) for end in range(1, num_layers + 1)}]
    for stage in range(1, num_stages):
        row = {}
        for end in range(stage + 1, num_layers + 1):
            row[end] = min(
                (max(best[-1][start][0], prefix[end] - prefix[start] + _extra(stage, num_stages, last_extra)), -start)
                for start in range(stage, end)
            )
            row[end] = (row[end][0], -row[end][1])
        best.append(row)
    ranges: list[range] = []
    end = num_layers
    for stage in reversed(range(num_stages)):
        start = best[stage][end][1]
        ranges.insert(0, range(start, end))
        end = start
    return ranges


def explicit_split(counts: Sequence[int]) -> list[range]:
    """The ranges for given numbers of layers a stage."""
    ranges, start = [], 0
    for count in counts:
        ranges.append(range(start, start + count))
        start += count
    return ranges


def _extra(stage: int, num_stages: int, last_extra: float) -> float:
    return last_extra if stage == num_stages - 1 else 0.0
