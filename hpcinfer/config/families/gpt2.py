"""config.json of GPT-2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcinfer.config.families.common import activation_name, read_shared
from hpcinfer.errors import CheckpointError

# Setting -> the one value that is computed, which is also the value of a missing key.
_FIXED = {
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
# <|endoftext|>, which begins and ends texts: what missing keys mean to transformers.
_SPECIAL_IDS = {"bos_token_id": 50256, "eos_token_id": 50256}


def read(family: str, raw: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ModelConfig of GPT-2. Defaults for missing keys are those of transformers."""
    for name, wanted in _FIXED.items():
        if bool(raw.get(name, wanted)) != wanted:
            raise CheckpointError(f"{name} = {raw[name]!r} is not supported", fix=f"only {str(wanted).lower()} is")
    hidden, heads = raw["n_embd"], raw["n_head"]
    if hidden % heads:
        raise CheckpointError(
            "n_head does not divide n_embd", found=f"n_embd {hidden}, n_head {heads}",
            fix="use the config.json that belongs to these weights",
        )
    return dict(
        family=family,
        vocab_size=raw["vocab_size"],
        hidden_size=hidden,
        intermediate_size=4 * hidden if raw.get("n_inner") is None else raw["n_inner"],
        num_layers=raw["n_layer"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        norm="layer",
        rms_norm_eps=float(raw.get("layer_norm_epsilon", 1e-5)),
        rope=None,
        learned_positions=True,
        max_position_embeddings=raw.get("n_positions", 1024),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", True)),
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        gated_mlp=False,
        hidden_act=activation_name(raw.get("activation_function", "gelu_new")),
        **read_shared({**_SPECIAL_IDS, **raw}, generation),
    )
