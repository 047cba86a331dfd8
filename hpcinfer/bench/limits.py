"""What this machine can do at best: memory bandwidth and matrix rate, measured.

Limited by: `read_bytes_per_s` by the memory channels that the threads of this process reach, or those of the GPU;
`matmul_flops_per_s` by the matrix units and the clock.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

_REPEATS = 5
_READ_BYTES = {"cpu": 2**29, "cuda": 2**31}
_MATMUL_SHAPE = {"cpu": (1024, 1024, 3072), "cuda": (8192, 8192, 8192)}
CPU = torch.device("cpu")

REFERENCE_READ_BYTES_PER_S = 21e9
REFERENCE_MATMUL_FLOPS_PER_S = {"float32": 335e9, "bfloat16": 2450e9, "float16": 2450e9}
"""Best figures of 2 cores with AMX (November 2026). On a CPU the larger of these and the measured ones is the limit that a share
is given of, so that a busy machine does not flatter it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MachineLimits:
    """The limits that shares are computed against."""

    read_bytes_per_s: float
    matmul_flops_per_s: float
    measured_read_bytes_per_s: float
    measured_matmul_flops_per_s: float


def machine_limits(dtype: str, device: torch.device = CPU) -> MachineLimits:
    """Measure; on a CPU take the larger of the measured and the reference figures. `dtype` is that of the matrices."""
    read, matmul = measure_read(device), measure_matmul(getattr(torch, dtype), device)
    reference = device.type == "cpu"
    return MachineLimits(
        read_bytes_per_s=max(read, REFERENCE_READ_BYTES_PER_S * reference),
        matmul_flops_per_s=max(matmul, REFERENCE_MATMUL_FLOPS_PER_S[dtype] * reference),
        measured_read_bytes_per_s=read,
        measured_matmul_flops_per_s=matmul,
    )


def measure_read(device: torch.device = CPU) -> float:
    """Bytes per second, the best of five: of summing 512 MiB on a CPU; on a GPU of summing 2 GiB or of copying them, which
    reads and writes, whichever is more."""
    size = _READ_BYTES[device.type]
    data = torch.ones(size // 4, dtype=torch.float32, device=device)
    read = size / best_seconds(data.sum, device)
    if device.type == "cpu":
        return read
    copy = torch.empty_like(data)
    return max(read, 2 * size / best_seconds(lambda: copy.copy_(data), device))


def measure_matmul(dtype: torch.dtype, device: torch.device = CPU) -> float:
    """Floating-point operations per second of a product [1024, 1024] x [1024, 3072], on a GPU of 8192 each way, the best of
    five."""
    rows, inner, columns = _MATMUL_SHAPE[device.type]
    left, right = (torch.randn(n, inner, device=device).to(dtype) for n in (rows, columns))
    return 2 * rows * inner * columns / best_seconds(lambda: torch.nn.functional.linear(left, right), device)


def best_seconds(function: Callable[[], object], device: torch.device) -> float:
    """The shortest of five calls after one to warm up."""
    function()
    return min(seconds_of(function, device) for _ in range(_REPEATS))


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """One call, by the clock of the device that computes."""
    if device.type == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    function()
    events[1].record()
    events[1].synchronize()
    return events[0].elapsed_time(events[1]) / 1000
