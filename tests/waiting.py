"""Waiting for what another thread does."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(condition: Callable[[], bool], *, within_s: float = 20.0) -> None:
    """Return as soon as `condition` holds; an AssertionError when it does not in time."""
    end_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end_s, "what was waited for did not happen"
        time.sleep(0.001)
