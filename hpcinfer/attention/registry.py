"""Which attention backend computes a model on a machine, and why not another."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hpcinfer.attention.base import AttentionBackend, AttentionQuery
from hpcinfer.attention.naive import NaiveBackend
from hpcinfer.attention.sdpa import SdpaBackend
from hpcinfer.config.model import ModelConfig, heads_per_rank
from hpcinfer.errors import ConfigError

BACKENDS: dict[str, Callable[[], AttentionBackend]] = {
    "SDPA": SdpaBackend,
    "NAIVE": NaiveBackend,
}
"""Name -> constructor, in the order in which the automatic choice tries them."""

ENVIRONMENT_VARIABLE = "HPCINFER_ATTENTION_BACKEND"


def attention_query(
    config: ModelConfig, *, tp: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> AttentionQuery:
    """What a model under `tp` ranks asks of a backend on `device`."""
    num_heads, num_kv_heads = heads_per_rank(config.num_heads, config.num_kv_heads, tp)
    return AttentionQuery(
        device_type=device.type,
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        dtype=dtype,
        head_dim=config.head_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        sliding_window=any(window is not None for window in config.sliding_window),
        sinks=config.attention_sinks,
    )


def select_backend(query: AttentionQuery, *, setting: str = "", environment: str = "") -> AttentionBackend:
    """Choose: the setting, then the environment variable, then the first backend that does not refuse.

    Args:
        query: what the model and the machine need.
        setting: a backend's name from the job file; "" or "auto" leaves the choice open.
        environment: the value of HPCINFER_ATTENTION_BACKEND ("" when unset); read by the caller.

    Raises:
        ConfigError: an unknown name (the valid ones are listed), or a backend that refuses (the condition is named).
    """
    for source, name in (("attention backend", setting), (ENVIRONMENT_VARIABLE, environment)):
        if name and name.upper() != "AUTO":
            return _named_backend(name, source, query)
    refused = []
    for name, make in BACKENDS.items():
        backend = make()
        reason = backend.refuses(query)
        if reason is None:
            return backend
        refused.append(f"{name}: {reason}")
    raise ConfigError("no attention backend can compute this model here", found="; ".join(refused))


def explain_backends(query: AttentionQuery) -> dict[str, str | None]:
    """For each backend the condition that fails for `query`, None where it would be accepted."""
    return {name: make().refuses(query) for name, make in BACKENDS.items()}


def _named_backend(name: str, source: str, query: AttentionQuery) -> AttentionBackend:
    make = BACKENDS.get(name.upper())
    if make is None:
        raise ConfigError(f"{source} = {name!r} is unknown", fix=f"valid: auto, {', '.join(BACKENDS)}")
    backend = make()
    reason = backend.refuses(query)
    if reason is not None:
        accepted = [other for other, failed in explain_backends(query).items() if failed is None]
        raise ConfigError(
            f"{source} = {name!r} refuses this model", found=reason,
            fix=f"use auto or one of: {', '.join(accepted) or 'none'}",
        )
    return backend
