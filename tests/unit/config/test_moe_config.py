"""ModelConfig of the families with experts: as published, as transformers 5 writes them, and what is refused."""

from __future__ import annotations

import math

import pytest

from hpcinfer.config.model import ModelConfig
from hpcinfer.errors import CheckpointError

# The parts of the published files that matter here.
MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2,
}
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960,
    "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_sliding_window": False, "vocab_size": 151936,
}
GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "experts_per_token": 4, "head_dim": 64,
    "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
    "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
    "num_key_value_heads": 8, "num_local_experts": 32, "rms_norm_eps": 1e-05,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    },
    "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False,
    "vocab_size": 201088, "eos_token_id": 200002,
}
PUBLISHED = {"mixtral": MIXTRAL_8X7B, "qwen3": QWEN3_30B_A3B, "gpt-oss": GPT_OSS_20B}


def test_mixtral():
    config = ModelConfig.from_dict(MIXTRAL_8X7B)
    assert (config.num_experts, config.experts_per_token, config.expert_size) == (8, 2, 14336)
    assert (config.router, config.normalize_topk, config.head_dim) == ("softmax_topk", True, 128)
    assert config.moe_layers == (True,) * 32 and config.sliding_window == (None,) * 32
    assert not (config.qkv_bias or config.qk_norm or config.attention_sinks or config.expert_bias)
    assert ModelConfig.from_dict({**MIXTRAL_8X7B, "sliding_window": 4096}).sliding_window == (4096,) * 32


def test_qwen3_moe():
    config = ModelConfig.from_dict(QWEN3_30B_A3B)
    assert (config.num_experts, config.experts_per_token, config.expert_size) == (128, 8, 768)
    assert (config.intermediate_size, config.head_dim, config.qk_norm) == (6144, 128, True)
    assert config.router == "softmax_topk" and config.normalize_topk and all(config.moe_layers)
    mixed = {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": False}
    config = ModelConfig.from_dict({**QWEN3_30B_A3B, **mixed})
    assert config.moe_layers == (False, True, False, False, False, True) and not config.normalize_topk
    windows = {**QWEN3_30B_A3B, "use_sliding_window": True, "sliding_window": 512}
    assert ModelConfig.from_dict(windows).sliding_window == (512,) * 48
    saved = {key: value for key, value in QWEN3_30B_A3B.items() if key != "num_experts"}
    assert ModelConfig.from_dict({**saved, "num_local_experts": 64}).num_experts == 64


def test_gpt_oss():
    config = ModelConfig.from_dict(GPT_OSS_20B)
    assert (config.num_experts, config.experts_per_token, config.expert_size) == (32, 4, 2880)
    assert config.router == "topk_softmax" and config.router_bias and config.expert_bias and config.attention_sinks
    assert config.swiglu_limit == 7.0 and config.expert_format == "mxfp4" and config.qkv_bias and config.o_bias
    assert config.sliding_window == (128, None) * 12
    rope = config.rope
    assert (rope.type, rope.theta, rope.factor, rope.truncate) == ("yarn", 150000.0, 32.0, False)
    assert rope.attention_factor == pytest.approx(0.1 * math.log(32) + 1)
    implied = ("quantization_config", "layer_types", "rope_scaling")
    plain = {key: value for key, value in GPT_OSS_20B.items() if key not in implied}
    assert ModelConfig.from_dict(plain).expert_format == ""
    assert ModelConfig.from_dict(plain) == ModelConfig.from_dict({**GPT_OSS_20B, "quantization_config": None})


@pytest.mark.parametrize("name", PUBLISHED)
def test_missing_keys_mean_what_they_mean_to_transformers(name):
    import transformers

    raw = PUBLISHED[name]
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    bare = {key: raw[key] for key in ("architectures", *needed)}
    theirs = getattr(transformers, raw["architectures"][0].replace("ForCausalLM", "Config"))(**bare).to_dict()
    wanted = ModelConfig.from_dict({**theirs, "architectures": raw["architectures"], "quantization_config": None})
    special = {key: theirs[key] for key in ("bos_token_id", "eos_token_id")}
    assert ModelConfig.from_dict({**bare, **special}) == wanted


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mixtral", {"quantization_config": {"quant_method": "mxfp4"}}, "quant_method 'mxfp4'"),
        ("gpt-oss", {"quantization_config": {"quant_method": "fp8"}}, "quant_method 'fp8'"),
        ("gpt-oss", {"swiglu_alpha": 2.0}, "swiglu_alpha must be 1.702"),
        ("gpt-oss", {"swiglu_limit": None}, "swiglu_limit above 0"),
        ("gpt-oss", {"intermediate_size": 2888}, "blocks of 32"),
        ("gpt-oss", {"layer_types": ["chunked_attention"] * 24}, "chunked_attention"),
        ("mixtral", {"num_experts_per_tok": 9}, "9 of 8 experts"),
        ("qwen3", {"num_experts": 0, "mlp_only_layers": None}, None),
    ],
)
def test_refusals(name, changes, message):
    raw = {**PUBLISHED[name], **changes}
    if message is None:
        assert not any(ModelConfig.from_dict(raw).moe_layers)  # a Qwen3-MoE without experts is dense
        return
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_dict(raw)
