"""What this machine can do at best: memory bandwidth and matrix rate, measured, beside those of a known machine.

Limited by: `read_bytes_per_s` by the memory channels that the threads of this process reach; `matmul_flops_per_s` by the
matrix units and the clock.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

_READ_BYTES = 2**29
_MATMUL_SHAPE = (1024, 1024, 3072)
_REPEATS = 5

REFERENCE_READ_BYTES_PER_S = 21e9
REFERENCE_MATMUL_FLOPS_PER_S = {"float32": 335e9, "bfloat16": 2450e9, "float16": 2450e9}
"""Best figures of 2 cores with AMX (November 2026). The larger of these and the measured ones is the limit that a share is
given of, so that a busy machine does not flatter it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MachineLimits:
    """The limits that shares are computed against."""

    read_bytes_per_s: float
    matmul_flops_per_s: float
    measured_read_bytes_per_s: float
    measured_matmul_flops_per_s: float


def machine_limits(dtype: str) -> MachineLimits:
    """Measure, and take the larger of the measured and the reference figures. `dtype` is that of the matrices."""
    read, matmul = measure_read(), measure_matmul(getattr(torch, dtype))
    return MachineLimits(
        read_bytes_per_s=max(read, REFERENCE_READ_BYTES_PER_S),
        matmul_flops_per_s=max(matmul, REFERENCE_MATMUL_FLOPS_PER_S[dtype]),
        measured_read_bytes_per_s=read,
        measured_matmul_flops_per_s=matmul,
    )


def measure_read() -> float:
    """Bytes per second of summing 512 MiB, the best of five."""
    data = torch.ones(_READ_BYTES // 4, dtype=torch.float32)
    return _READ_BYTES / _best(data.sum)


def measure_matmul(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a [1024, 1024] x [1024, 3072] product, the best of five."""
    rows, inner, columns = _MATMUL_SHAPE
    left, right = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    return 2 * rows * inner * columns / _best(lambda: torch.nn.functional.linear(left, right))


def _best(function: Callable[[], object]) -> float:
    function()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)
