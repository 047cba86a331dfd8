"""A stand-in for the clock and the layers that `engine.overlap` measures: each step takes the time that a test
gives it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest

from hpcinfer.engine import overlap


def fake_measurement(patch: pytest.MonkeyPatch, duration_s: Callable[[Sequence[int]], float]) -> list[tuple[int, ...]]:
    """From now on a step of parts of these numbers of tokens takes `duration_s` of them.

    Returns:
        The measured steps, filled as they come.
    """
    measured: list[tuple[int, ...]] = []
    now_s = 0.0

    def interleave(parts: Sequence[int]) -> None:
        nonlocal now_s
        measured.append(tuple(parts))
        now_s += duration_s(parts)

    patch.setattr(overlap, "_layers", lambda model, kv, part, lane: part.num_tokens)
    patch.setattr(overlap, "interleave", interleave)
    patch.setattr(overlap, "time", SimpleNamespace(perf_counter=lambda: now_s))
    return measured


def gain_from(num_tokens: int, *, share: float = 0.5, token_s: float = 1e-4) -> Callable[[Sequence[int]], float]:
    """A divided step of at least `num_tokens` tokens takes `share` less than a whole one, a smaller one as
    much more."""

    def duration_s(parts: Sequence[int]) -> float:
        gain = share if sum(parts) >= num_tokens else -share
        return sum(parts) * token_s * (1 - gain if len(parts) == 2 else 1)

    return duration_s
