"""config.json of Llama, Mistral, Qwen2 and Qwen3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcinfer.config.checks import one_of
from hpcinfer.config.families.common import activation_name, read_rope, read_shared

_DEFAULT_CONTEXT = {
    "LlamaForCausalLM": 2048, "MistralForCausalLM": 131072, "Qwen2ForCausalLM": 32768, "Qwen3ForCausalLM": 32768,
}
_DEFAULT_KV_HEADS = {"MistralForCausalLM": 8, "Qwen2ForCausalLM": 32, "Qwen3ForCausalLM": 32}


def read(family: str, raw: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ModelConfig of Llama, Mistral, Qwen2 or Qwen3.

    Defaults for missing keys are those of the transformers config class of the family.
    """
    num_heads = raw["num_attention_heads"]
    attention_bias = bool(raw.get("attention_bias", False))
    default_head_dim = 128 if family == "Qwen3ForCausalLM" else raw["hidden_size"] // num_heads
    return dict(
        family=family,
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=raw.get("num_key_value_heads", _DEFAULT_KV_HEADS.get(family)) or num_heads,
        head_dim=raw.get("head_dim") or default_head_dim,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=read_rope(raw),
        max_position_embeddings=raw.get("max_position_embeddings", _DEFAULT_CONTEXT[family]),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        # Which projections have biases is fixed in the code of Mistral and Qwen2 and a setting in Llama and Qwen3.
        qkv_bias={"MistralForCausalLM": False, "Qwen2ForCausalLM": True}.get(family, attention_bias),
        o_bias={"MistralForCausalLM": False, "Qwen2ForCausalLM": False}.get(family, attention_bias),
        mlp_bias=family == "LlamaForCausalLM" and bool(raw.get("mlp_bias", False)),
        qk_norm=family == "Qwen3ForCausalLM",
        sliding_window=_read_windows(family, raw),
        hidden_act=activation_name(raw.get("hidden_act", "silu")),
        **read_shared(raw, generation),
    )


def _read_windows(family: str, raw: Mapping[str, Any]) -> tuple[int | None, ...]:
    """One window a layer, by the rules of the transformers config classes."""
    num_layers, window = raw["num_hidden_layers"], raw.get("sliding_window", 4096)
    types = raw.get("layer_types")
    is_mistral = family == "MistralForCausalLM"
    if window is None or not (is_mistral or (family.startswith("Qwen") and raw.get("use_sliding_window", False))):
        return (None,) * num_layers
    if types is None and is_mistral:
        return (window,) * num_layers
    if types is None:
        first = raw.get("max_window_layers", 28)
        return tuple(window if i >= first else None for i in range(num_layers))
    known = {"sliding_attention": window, "full_attention": None}
    for name in types:
        one_of("layer_types entry", name, tuple(known))
    return tuple(known[name] for name in types)
