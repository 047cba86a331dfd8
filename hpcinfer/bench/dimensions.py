"""Published dimensions of models, for benchmarks on random weights."""

from __future__ import annotations

DIMENSIONS: dict[str, dict] = {
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960, "rope_theta": 1e6, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
    },
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 131072, "rope_theta": 5e5, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"], "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "max_position_embeddings": 131072,
        "rope_theta": 150000, "rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": True, "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
}
"""Contents of config.json by name."""
DIMENSIONS["gpt-oss-20b-mxfp4"] = {**DIMENSIONS["gpt-oss-20b"], "quantization_config": {"quant_method": "mxfp4"}}
DIMENSIONS["qwen3-0.6b-32k"] = {**DIMENSIONS["qwen3-0.6b"], "vocab_size": 32000}
DIMENSIONS["small"] = {
    **DIMENSIONS["qwen3-0.6b-32k"], "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 4096,
}
