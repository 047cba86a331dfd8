"""The choice of an attention backend, laid open: what this machine would use for a model, why not another, what GPUs would get."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from hpcinfer.attention.base import AttentionQuery, dtype_name, version
from hpcinfer.attention.registry import (
    AUTOMATIC, BACKENDS, PACKAGES, attention_query, explain_backends, select_backend,
)  # fmt: skip
from hpcinfer.config.model import ModelConfig
from hpcinfer.errors import ConfigError

EXAMPLE = ModelConfig(
    family="LlamaForCausalLM", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
    num_kv_heads=8, head_dim=128, dtype="bfloat16",
)
"""Asked about where no model is given: the dimensions of Llama-3.1-8B."""

GPUS: dict[tuple[int, int], str] = {
    (8, 0): "A100", (8, 9): "L4, L40, RTX 40", (9, 0): "H100, H200", (10, 0): "B200",
}  # fmt: skip
"""Compute capability -> GPUs that have it, for machines without one."""

_CUDA = (13, 0)
"""Of GPUs that are not here."""

NOT_SUPPORTED: dict[str, dict] = {
    "AMD/ROCm": {"hip": True},
    "FP8 K/V": {"kv_dtype": torch.float8_e4m3fn},
    "MLA": {"latent_kv": True},
}
"""What is asked for and no backend has -> how a query says it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BackendRow:
    """One backend on this machine."""

    name: str
    used: bool
    """It is the one that a run would take."""
    refused: str | None
    """The condition that failed; None where it would do."""
    capturable: bool
    """Its decode steps can be captured in a CUDA graph."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GpuRow:
    """What a GPU that is not here would get, with CUDA 13."""

    capability: str
    gpus: str
    backend: str | None
    """With all packages installed."""
    block_size: int
    """Tokens in a page then."""
    plain: str | None
    """The backend with torch's CUDA build alone."""
    missing: str | None
    """What torch's CUDA build lacks for the better one; None where it is the same."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttentionMatrix:
    """All that is known of the choice for one model."""

    device: str
    capability: str | None
    cuda: str | None
    packages: list[str]
    """Optional packages that were found."""
    model: str
    dtype: str
    head_dim: int
    num_heads: int
    """Of a rank."""
    num_kv_heads: int
    sliding_window: bool
    sinks: bool
    block_size: int | None
    """Tokens in a page of the backend that is used."""
    problem: str | None
    """Why none is used: of an environment variable that names one which refuses."""
    backends: list[BackendRow]
    gpus: list[GpuRow]
    """Empty on a machine that has one."""
    not_supported: dict[str, str]
    """What no backend has -> why."""


def attention_matrix(
    model: ModelConfig | None, name: str, *, dtype: str, tp: int, environment: str
) -> AttentionMatrix:
    """Ask all backends about a model on this machine.

    Args:
        model: None: EXAMPLE.
        name: of the model, for people.
        dtype: "auto" takes the checkpoint's own.
        tp: ranks that share the heads.
        environment: the value of HPCINFER_ATTENTION_BACKEND, "" when unset.

    Raises:
        ConfigError: the heads cannot be split so.
    """
    model = model or EXAMPLE
    dtype = model.dtype if dtype == "auto" else dtype
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    query = attention_query(model, tp=tp, block_size=0, dtype=getattr(torch, dtype), device=device)
    used, block_size, problem = None, None, None
    try:
        choice = select_backend(query, environment=environment)
        used, block_size = choice.backend.name, choice.block_size
    except ConfigError as error:
        problem = str(error)
    return AttentionMatrix(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        capability=version(query.capability) if query.capability else None,
        cuda=version(query.cuda_version) if query.cuda_version else None,
        packages=sorted(query.packages),
        model=name,
        dtype=dtype_name(query.dtype),
        head_dim=query.head_dim,
        num_heads=query.num_heads,
        num_kv_heads=query.num_kv_heads,
        sliding_window=query.sliding_window,
        sinks=query.sinks,
        block_size=block_size,
        problem=problem,
        backends=[
            BackendRow(name=backend, used=backend == used, refused=reason, capturable=BACKENDS[backend].capturable)
            for backend, reason in explain_backends(query, prepare=True).items()
        ],
        gpus=list(_gpu_rows(query)) if device.type == "cpu" else [],
        not_supported={
            name: next(iter(explain_backends(dataclasses.replace(query, **changes)).values()))
            for name, changes in NOT_SUPPORTED.items()
        },
    )


def _gpu_rows(query: AttentionQuery) -> Iterator[GpuRow]:
    for capability, gpus in GPUS.items():
        gpu = dataclasses.replace(
            query, device_type="cuda", capability=capability, cuda_version=_CUDA, packages=frozenset({*PACKAGES, "nvcc"})
        )
        plain = dataclasses.replace(gpu, packages=frozenset({"triton"}))  # which torch's CUDA build brings
        best = _first(gpu)
        yield GpuRow(
            capability=version(capability), gpus=gpus, backend=best,
            block_size=BACKENDS[best]().preferred_block_size(gpu) if best else 0,
            plain=_first(plain), missing=BACKENDS[best]().refuses(plain) if best else None,
        )


def _first(query: AttentionQuery) -> str | None:
    """The first backend of the automatic choice that does not refuse; nothing is imported."""
    return next((name for name in AUTOMATIC[query.device_type] if BACKENDS[name]().refuses(query) is None), None)
