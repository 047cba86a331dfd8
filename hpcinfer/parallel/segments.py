"""A forward as compute segments with communication between them.

A forward is a generator: it computes, yields the handle of a transfer that it has just issued, and is resumed with the
transfer's result. Its return value is the forward's result. Whoever drives it decides what happens while a transfer is
in flight: `run_to_end` waits at once; a first-in-first-out runner resumes other microbatches first (two-batch overlap).
Layers that contain others pass their segments on with `yield from`, so layer code is the same in every case.

Enter torch.inference_mode around whatever drives forwards, never inside one: it would leak into the caller at a yield.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeAlias

import torch

from hpcinfer.comm.communicator import Handle

Segments: TypeAlias = Generator[Handle, torch.Tensor, torch.Tensor]


def run_to_end(forward: Segments) -> torch.Tensor:
    """Drive a forward alone, waiting for each transfer as it comes. Returns the forward's result."""
    try:
        handle = next(forward)
        while True:
            handle = forward.send(handle.wait())
    except StopIteration as end:
        return end.value
