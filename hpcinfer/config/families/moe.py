"""config.json of the families with mixtures of experts: Mixtral, Qwen3-MoE, gpt-oss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcinfer.config.checks import one_of
from hpcinfer.config.families.common import activation_name, read_rope, read_shared
from hpcinfer.errors import CheckpointError

# What ModelConfig.swiglu_limit stands for has this gain in every released checkpoint, and no field for another.
_SWIGLU_ALPHA = 1.702
_GPT_OSS_ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read_mixtral(family: str, raw: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ModelConfig of Mixtral. Defaults are those of the transformers config class."""
    return dict(
        _read_base(family, raw, generation, rms_norm_eps=1e-5, rope_theta=1e6, max_positions=131072, num_kv_heads=8),
        intermediate_size=raw["intermediate_size"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        sliding_window=(raw.get("sliding_window"),) * raw["num_hidden_layers"],
        num_experts=_num_experts(raw, 8),
        experts_per_token=raw.get("num_experts_per_tok", 2),
        expert_size=raw["intermediate_size"],
        router="softmax_topk",
        normalize_topk=True,
    )


def read_qwen3_moe(family: str, raw: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ModelConfig of Qwen3-MoE. Defaults are those of the transformers config class."""
    num_layers, bias = raw["num_hidden_layers"], bool(raw.get("attention_bias", False))
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window", False) else None
    num_experts = _num_experts(raw, 128)
    dense, step = set(raw.get("mlp_only_layers") or ()), raw.get("decoder_sparse_step", 1)
    moe_layers = tuple(
        layer not in dense and num_experts > 0 and (layer + 1) % step == 0 for layer in range(num_layers)
    )
    return dict(
        _read_base(family, raw, generation, rms_norm_eps=1e-6, rope_theta=1e4, max_positions=32768, num_kv_heads=4),
        intermediate_size=raw["intermediate_size"],
        # The config class of transformers has no head_dim of its own, unlike that of Qwen3.
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        sliding_window=(window,) * num_layers,
        num_experts=num_experts,
        experts_per_token=raw.get("num_experts_per_tok", 8),
        expert_size=raw.get("moe_intermediate_size", 768),
        router="softmax_topk",
        normalize_topk=bool(raw.get("norm_topk_prob", False)),
        moe_layers=moe_layers,
    )


def read_gpt_oss(family: str, raw: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ModelConfig of gpt-oss. Defaults are those of the transformers config class.

    Raises:
        CheckpointError: a gating or an MXFP4 size that is not supported.
    """
    if not (raw.get("rope_scaling") or raw.get("rope_parameters")):
        raw = {**raw, "rope_scaling": _GPT_OSS_ROPE}
    bias, size = bool(raw.get("attention_bias", True)), raw["intermediate_size"]
    alpha, limit = raw.get("swiglu_alpha", _SWIGLU_ALPHA), raw.get("swiglu_limit", 7.0)
    if alpha != _SWIGLU_ALPHA or not limit or limit <= 0:
        raise CheckpointError(
            "the gating of the experts is not supported", found=f"swiglu_alpha {alpha}, swiglu_limit {limit}",
            fix=f"swiglu_alpha must be {_SWIGLU_ALPHA} and swiglu_limit above 0",
        )
    packed = bool(raw.get("quantization_config"))
    if packed and (size % 32 or raw["hidden_size"] % 32):
        raise CheckpointError(
            "MXFP4 weights come in blocks of 32 values", found=f"sizes {raw['hidden_size']} and {size}",
        )
    return dict(
        _read_base(family, raw, generation, rms_norm_eps=1e-5, rope_theta=150000.0, max_positions=131072,
                   num_kv_heads=8),
        intermediate_size=size,
        head_dim=raw.get("head_dim", 64) or raw["hidden_size"] // raw["num_attention_heads"],
        qkv_bias=bias,
        o_bias=bias,
        sliding_window=_gpt_oss_windows(raw),
        attention_sinks=True,
        num_experts=_num_experts(raw, 128),
        experts_per_token=raw.get("num_experts_per_tok", raw.get("experts_per_token", 4)),
        expert_size=size,
        router="topk_softmax",
        router_bias=True,
        expert_bias=True,
        swiglu_limit=float(limit),
        expert_format="mxfp4" if packed else "",
    )


def _read_base(
    family: str, raw: Mapping[str, Any], generation: Mapping[str, Any], *,
    rms_norm_eps: float, rope_theta: float, max_positions: int, num_kv_heads: int,
) -> dict[str, Any]:
    """What the three share; the keyword arguments are a family's defaults."""
    num_heads = raw["num_attention_heads"]
    return dict(
        family=family,
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=raw.get("num_key_value_heads", num_kv_heads) or num_heads,
        rms_norm_eps=float(raw.get("rms_norm_eps", rms_norm_eps)),
        rope=read_rope({"rope_theta": rope_theta, "max_position_embeddings": max_positions, **raw}),
        max_position_embeddings=raw.get("max_position_embeddings", max_positions),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        hidden_act=activation_name(raw.get("hidden_act", "silu")),
        **read_shared(raw, generation),
    )


def _num_experts(raw: Mapping[str, Any], default: int) -> int:
    """transformers 5 writes num_local_experts for every family, older versions num_experts for Qwen3-MoE."""
    return raw.get("num_local_experts", raw.get("num_experts", default))


def _gpt_oss_windows(raw: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Sliding and full layers take turns, sliding first, where layer_types does not say otherwise."""
    num_layers = raw["num_hidden_layers"]
    types = raw.get("layer_types")
    if types is None:
        types = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(num_layers)]
    known = {"sliding_attention": raw.get("sliding_window", 128), "full_attention": None}
    for name in types:
        one_of("layer_types entry", name, tuple(known))
    return tuple(known[name] for name in types)
