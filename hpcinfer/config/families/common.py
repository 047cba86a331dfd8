"""What the readers of several families share: ids, dtype, activation names, rotary embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hpcinfer.config.checks import one_of
from hpcinfer.config.rope import ROPE_TYPES, RopeConfig
from hpcinfer.errors import CheckpointError

_ACTIVATION_NAMES = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh",
}


def read_shared(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that mean the same in every family: dtype and special ids."""
    return {
        "dtype": str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
        "eos_token_ids": ids(raw.get("eos_token_id"), generation.get("eos_token_id")),
        "bos_token_id": first_id(generation.get("bos_token_id", raw.get("bos_token_id"))),
        "pad_token_id": first_id(generation.get("pad_token_id", raw.get("pad_token_id"))),
    }


def activation_name(value: str) -> str:
    """Our name of an activation of transformers; an unknown one stays as it is and is refused by ModelConfig."""
    return _ACTIVATION_NAMES.get(value, value)


def read_rope(raw: Mapping[str, Any]) -> RopeConfig:
    """transformers 5 writes `rope_parameters`; older folders have `rope_theta` beside `rope_scaling`."""
    # A folder that has both was given scaling by hand: transformers then takes that alone.
    values = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    if any(isinstance(value, Mapping) for value in values.values()):
        raise CheckpointError("rope parameters that differ by layer type are not supported", found=", ".join(values))
    kind = values.get("rope_type") or values.get("type") or "default"
    one_of("rope type", kind, ROPE_TYPES)
    partial = values.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise CheckpointError(f"partial_rotary_factor = {partial} is not supported", fix="only 1.0 is")
    original = values.get("original_max_position_embeddings") or raw.get("max_position_embeddings", 2048)
    factor = values["factor"] if kind in ("linear", "llama3") else values.get("factor")
    if kind == "yarn" and factor is None:
        factor = raw["max_position_embeddings"] / original
    fields = {
        name: float(values[name])
        for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow") if values.get(name) is not None
    }
    return RopeConfig(
        theta=float(values.get("rope_theta") or raw.get("rope_theta") or 10000.0),
        type=kind,
        factor=float(factor or 1.0),
        original_max_position_embeddings=int(original),
        truncate=bool(values.get("truncate", True)),
        attention_factor=_yarn_attention_factor(values, float(factor)) if kind == "yarn" else 1.0,
        **fields,
    )


def _yarn_attention_factor(values: Mapping[str, Any], factor: float) -> float:
    """Section 3.4 of the YaRN paper, with DeepSeek's mscale variant, as transformers computes it."""
    if values.get("attention_factor") is not None:
        return float(values["attention_factor"])

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if values.get("mscale") and values.get("mscale_all_dim"):
        return mscale(values["mscale"]) / mscale(values["mscale_all_dim"])
    return mscale(1.0)


def ids(*values: int | list[int] | None) -> tuple[int, ...]:
    """Every id once, in order of appearance."""
    found: list[int] = []
    for value in values:
        found.extend(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return tuple(dict.fromkeys(int(i) for i in found))


def first_id(value: int | list[int] | None) -> int | None:
    found = ids(value)
    return found[0] if found else None
