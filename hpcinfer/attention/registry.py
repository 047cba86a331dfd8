"""Which attention backend computes a model on a machine, and why not another.

The matrix of devices, compute capabilities, dtypes, head sizes and features is what each backend's `refuses` says.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from hpcinfer.attention.base import AttentionBackend, AttentionQuery
from hpcinfer.attention.flash import FlashBackend
from hpcinfer.attention.flash_infer import FlashInferBackend
from hpcinfer.attention.flex import FlexBackend
from hpcinfer.attention.naive import NaiveBackend
from hpcinfer.attention.sdpa import SdpaBackend
from hpcinfer.attention.triton_backend import TritonBackend
from hpcinfer.config.model import ModelConfig, heads_per_rank
from hpcinfer.errors import ConfigError

BACKENDS: dict[str, Callable[[], AttentionBackend]] = {
    "FLASH_ATTN": FlashBackend,
    "TRITON": TritonBackend,
    "FLASHINFER": FlashInferBackend,
    "FLEX_ATTENTION": FlexBackend,
    "SDPA": SdpaBackend,
    "NAIVE": NaiveBackend,
}
"""Name -> constructor."""

AUTOMATIC: dict[str, tuple[str, ...]] = {
    # FlashInfer would compile for minutes at a run's start, and does nothing here that the two before it do not.
    "cuda": ("FLASH_ATTN", "TRITON", "FLEX_ATTENTION", "SDPA", "NAIVE"),
    "cpu": ("SDPA", "NAIVE"),
}
"""Device -> what the automatic choice tries, the best first."""

REPLACED: dict[str, str] = {
    "XFORMERS": "its fast kernels are those of flash-attn: FLASH_ATTN, or TRITON for what that does not have",
}
"""Names that other programs know -> what stands in their place here."""

ENVIRONMENT_VARIABLE = "HPCINFER_ATTENTION_BACKEND"

PACKAGES = ("triton", "flash_attn", "flash_attn_interface", "flashinfer", "flashinfer_jit_cache")
"""Optional packages by the name that is imported; `nvcc`, a program, is looked for beside them."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttentionChoice:
    """A backend that accepts a query, prepared."""

    backend: AttentionBackend
    block_size: int
    """Tokens in a page: what was asked for, or what the backend prefers."""
    passed_over: dict[str, str]
    """Backends that the automatic choice would have preferred, each with the condition that failed. Empty for a named one."""


def installed_packages() -> frozenset[str]:
    """Which of PACKAGES can be found, without importing them; and `nvcc`."""
    found = {name for name in PACKAGES if importlib.util.find_spec(name) is not None}
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return frozenset(found | ({"nvcc"} if shutil.which("nvcc") or (Path(home) / "bin/nvcc").exists() else set()))


def attention_query(
    config: ModelConfig, *, tp: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> AttentionQuery:
    """What a model under `tp` ranks asks of a backend on `device`. `block_size` 0 leaves it to the backend."""
    num_heads, num_kv_heads = heads_per_rank(config.num_heads, config.num_kv_heads, tp)
    cuda = torch.version.cuda
    return AttentionQuery(
        device_type=device.type,
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        cuda_version=tuple(map(int, cuda.split(".")[:2])) if cuda else None,
        hip=torch.version.hip is not None,
        packages=installed_packages(),
        dtype=dtype,
        head_dim=config.head_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        sliding_window=any(window is not None for window in config.sliding_window),
        sinks=config.attention_sinks,
    )


def select_backend(query: AttentionQuery, *, setting: str = "", environment: str = "") -> AttentionChoice:
    """Choose: the setting, then the environment variable, then the first of AUTOMATIC that does not refuse.

    Args:
        query: what the model and the machine need.
        setting: a backend's name from the job file; "" or "auto" leaves the choice open.
        environment: the value of HPCINFER_ATTENTION_BACKEND ("" when unset); read by the caller.

    Raises:
        ConfigError: an unknown name (the valid ones are listed), or a backend that refuses (the condition is named).
    """
    for source, name in (("attention backend", setting), (ENVIRONMENT_VARIABLE, environment)):
        if name and name.upper() != "AUTO":
            return _named(name, source, query)
    refused: dict[str, str] = {}
    for name in AUTOMATIC[query.device_type]:
        backend = BACKENDS[name]()
        reason = _condition(backend, query)
        if reason is None:
            return _choice(backend, query, refused)
        refused[name] = reason
    raise ConfigError(
        "no attention backend can compute this model here", found="; ".join(f"{name}: {reason}" for name, reason in refused.items())
    )


def explain_backends(query: AttentionQuery, *, prepare: bool = False) -> dict[str, str | None]:
    """For each backend the condition that fails for `query`, None where it would be accepted.

    Args:
        prepare: also try to import what it needs, for a query about this machine.
    """
    return {name: _condition(make(), query, prepare=prepare) for name, make in BACKENDS.items()}


def _condition(backend: AttentionBackend, query: AttentionQuery, *, prepare: bool = True) -> str | None:
    reason = backend.refuses(query)
    if reason is None and prepare:
        try:
            backend.prepare(query)
        except ImportError as error:  # installed, but built for another torch or CUDA
            return f"cannot be imported: {error}"
    return reason


def _choice(backend: AttentionBackend, query: AttentionQuery, passed_over: dict[str, str]) -> AttentionChoice:
    block_size = query.block_size or backend.preferred_block_size(query)
    return AttentionChoice(backend=backend, block_size=block_size, passed_over=passed_over)


def _named(name: str, source: str, query: AttentionQuery) -> AttentionChoice:
    make = BACKENDS.get(name.upper())
    if make is None:
        instead = REPLACED.get(name.upper())
        raise ConfigError(
            f"{source} = {name!r} is {'not part of hpcinfer' if instead else 'unknown'}", found=instead or "",
            fix=f"valid: auto, {', '.join(BACKENDS)}",
        )
    backend = make()
    reason = _condition(backend, query)
    if reason is not None:
        accepted = [other for other, failed in explain_backends(query).items() if failed is None and other != name.upper()]
        raise ConfigError(
            f"{source} = {name!r} cannot compute this model here", found=reason,
            fix=f"use auto or one of: {', '.join(accepted) or 'none'}",
        )
    return _choice(backend, query, {})
