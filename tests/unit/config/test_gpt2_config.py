"""config.json of GPT-2, and the fields that dense Llamas leave at their defaults."""

from __future__ import annotations

import dataclasses

import pytest

from hpcinfer.config.model import ModelConfig
from hpcinfer.config.rope import RopeConfig
from hpcinfer.errors import CheckpointError, ConfigError

# The keys that the folder of the published small model has, with small numbers.
PUBLISHED = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 96,
    "embd_pdrop": 0.1, "eos_token_id": 96, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
    "n_ctx": 64, "n_embd": 48, "n_head": 12, "n_layer": 2, "n_positions": 64, "resid_pdrop": 0.1,
    "summary_type": "cls_index", "vocab_size": 97,
}
LLAMA = ModelConfig(
    family="LlamaForCausalLM", vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=2, num_heads=2,
    num_kv_heads=2, head_dim=4,
)
MIXTURE = {"num_experts": 4, "experts_per_token": 2, "expert_size": 6, "router": "softmax_topk"}


def gpt2(**changes) -> ModelConfig:
    return ModelConfig.from_dict({**PUBLISHED, **changes})


def test_published():
    model = gpt2()
    assert (model.hidden_size, model.intermediate_size, model.num_layers, model.vocab_size) == (48, 192, 2, 97)
    assert (model.num_heads, model.num_kv_heads, model.head_dim) == (12, 12, 4)
    assert (model.norm, model.rms_norm_eps, model.hidden_act) == ("layer", 1e-5, "gelu_tanh")
    assert model.rope is None and model.learned_positions and model.max_position_embeddings == 64
    assert model.tie_word_embeddings and model.qkv_bias and model.o_bias and model.mlp_bias and not model.gated_mlp
    assert (model.eos_token_ids, model.bos_token_id, model.dtype) == ((96,), 96, "float32")


def test_settings():
    assert gpt2(n_inner=100).intermediate_size == 100
    assert gpt2(n_inner=None).intermediate_size == 192
    assert not gpt2(tie_word_embeddings=False).tie_word_embeddings
    assert gpt2(activation_function="relu").hidden_act == "relu"
    assert gpt2(n_head=16).head_dim == 3  # odd: nothing rotates
    assert gpt2(architectures=None).family == "GPT2LMHeadModel"
    with pytest.raises(ConfigError, match="nearest valid tp: 4 or 6 "):
        gpt2().check_tp(5)


def test_missing_keys_mean_what_they_mean_to_transformers():
    import transformers

    raw = {
        name: PUBLISHED[name] for name in ("architectures", "model_type", "n_embd", "n_head", "n_layer", "vocab_size")
    }
    wanted, model = transformers.GPT2Config(**raw), ModelConfig.from_dict(raw)
    assert model.max_position_embeddings == wanted.n_positions
    assert model.rms_norm_eps == wanted.layer_norm_epsilon
    assert wanted.activation_function == "gelu_new" and model.hidden_act == "gelu_tanh"
    assert model.tie_word_embeddings == wanted.tie_word_embeddings
    assert model.eos_token_ids == (wanted.eos_token_id,) and model.bos_token_id == wanted.bos_token_id


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_attn_weights": False}, "scale_attn_weights = False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn = True"),
        ({"add_cross_attention": True}, "add_cross_attention = True"),
        ({"n_head": 7}, "(?s)n_head does not divide n_embd.*n_embd 48, n_head 7"),
        ({"n_head": 0}, "a value is not what it should be"),
        ({"activation_function": "tanh"}, "hidden_act 'tanh'"),
        ({"n_positions": 0}, "max_position_embeddings = 0"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(CheckpointError, match=message):
        gpt2(**changes)


@pytest.mark.parametrize("key", ["n_embd", "n_head", "n_layer", "vocab_size"])
def test_missing_sizes(key):
    with pytest.raises(CheckpointError, match=f"the key '{key}' is missing"):
        ModelConfig.from_dict({name: value for name, value in PUBLISHED.items() if name != key})


def test_defaults_are_a_dense_llama():
    assert LLAMA.norm == "rms" and LLAMA.gated_mlp and not LLAMA.learned_positions and not LLAMA.attention_sinks
    assert LLAMA.num_experts == 0 and LLAMA.moe_layers == (False, False) and LLAMA.expert_format == ""


def test_every_layer_is_a_mixture_unless_said_otherwise():
    raw = {field.name: getattr(LLAMA, field.name) for field in dataclasses.fields(LLAMA) if field.name != "moe_layers"}
    assert ModelConfig(**{**raw, **MIXTURE}).moe_layers == (True, True)
    assert ModelConfig(**{**raw, **MIXTURE}, moe_layers=(False, True)).moe_layers == (False, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "batch"}, "norm 'batch'"),
        ({"learned_positions": True}, "either a rotary embedding or learned positions"),
        ({"rope": None}, "either a rotary embedding or learned positions"),
        ({"rope": RopeConfig(type="longrope")}, "rope type 'longrope'"),
        ({"head_dim": 5}, "head_dim = 5"),
        ({"moe_layers": (True,)}, "1 entries, 2 layers"),
        ({"moe_layers": (True, False)}, "num_experts = 0"),
        ({**MIXTURE, "experts_per_token": 5}, "5 of 4 experts"),
        ({**MIXTURE, "experts_per_token": 0}, "experts_per_token = 0"),
        ({**MIXTURE, "expert_size": 0}, "expert_size = 0"),
        ({**MIXTURE, "num_experts": -1}, "num_experts = -1"),
        ({**MIXTURE, "router": "sigmoid"}, "(?s)router 'sigmoid'.*softmax_topk, topk_softmax"),
        ({**MIXTURE, "swiglu_limit": -1.0}, "swiglu_limit = -1.0"),
        ({"expert_format": "int3"}, "(?s)expert format 'int3'.*mxfp4"),
    ],
)
def test_misfits(changes, message):
    with pytest.raises(CheckpointError, match=message):
        dataclasses.replace(LLAMA, **changes)
