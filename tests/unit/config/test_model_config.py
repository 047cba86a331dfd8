"""ModelConfig from the folders of transformers 5, from older keys, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from hpcinfer.config.model import ModelConfig, heads_per_rank
from hpcinfer.doctor.file_probe import nearest_folder
from hpcinfer.errors import CheckpointError, ConfigError
from tests.other_user import another_user, needs_root, secret_folder

BASE = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512,
}


def config(generation=None, **changes) -> ModelConfig:
    return ModelConfig.from_dict({**BASE, **changes}, generation)


def test_defaults():
    model = config()
    assert (model.head_dim, model.num_kv_heads, model.rms_norm_eps) == (8, 2, 1e-6)
    assert (model.rope.theta, model.rope.type) == (10000.0, "default")
    assert model.sliding_window == (None,) * 4
    assert not (model.tie_word_embeddings or model.qkv_bias or model.o_bias or model.mlp_bias or model.qk_norm)
    assert config(num_key_value_heads=None).num_kv_heads == 8
    assert config(head_dim=24).head_dim == 24
    assert config(torch_dtype="bfloat16").dtype == config(dtype="torch.bfloat16").dtype == "bfloat16"


def test_families():
    qwen2 = config(architectures=["Qwen2ForCausalLM"])
    assert qwen2.qkv_bias and not qwen2.o_bias and not qwen2.qk_norm
    qwen3 = config(architectures=["Qwen3ForCausalLM"], head_dim=16)
    assert qwen3.qk_norm and not qwen3.qkv_bias and qwen3.head_dim == 16
    llama = config(attention_bias=True, mlp_bias=True)
    assert llama.qkv_bias and llama.o_bias and llama.mlp_bias
    mistral = config(architectures=["MistralForCausalLM"], sliding_window=32, attention_bias=True)
    assert mistral.sliding_window == (32,) * 4 and not mistral.qkv_bias
    assert config(architectures=["MistralForCausalLM"], sliding_window=None).sliding_window == (None,) * 4
    assert config(architectures=None, model_type="qwen2").family == "Qwen2ForCausalLM"


def test_windows_of_qwen():
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 16}
    assert config(**qwen).sliding_window == (None,) * 4
    assert config(**qwen, use_sliding_window=True, max_window_layers=3).sliding_window == (None, None, None, 16)
    types = ["sliding_attention", "full_attention"] * 2
    assert config(**qwen, use_sliding_window=True, layer_types=types).sliding_window == (16, None, 16, None)
    with pytest.raises(CheckpointError, match="layer_types"):
        config(**qwen, use_sliding_window=True, layer_types=types[:3])
    with pytest.raises(CheckpointError, match="chunked_attention"):
        config(**qwen, use_sliding_window=True, layer_types=["chunked_attention"] * 4)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def test_rope_in_old_and_new_keys():
    old = config(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3})
    new = config(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    assert old.rope == new.rope
    assert (new.rope.theta, new.rope.factor, new.rope.original_max_position_embeddings) == (5e5, 8.0, 64)
    assert config(rope_scaling={"type": "linear", "factor": 2.0}).rope.factor == 2.0
    yarn = config(rope_parameters={"rope_type": "yarn", "original_max_position_embeddings": 128}).rope
    assert yarn.factor == 4.0 and yarn.attention_factor == pytest.approx(1.1386, abs=1e-4)


def test_rope_refusals():
    with pytest.raises(CheckpointError, match="(?s)rope type 'longrope'.*default, linear, llama3, yarn"):
        config(rope_scaling={"type": "longrope", "factor": 2.0})
    with pytest.raises(CheckpointError, match="'factor' is missing"):
        config(rope_scaling={"type": "linear"})
    with pytest.raises(CheckpointError, match="partial_rotary_factor = 0.5"):
        config(partial_rotary_factor=0.5)
    with pytest.raises(CheckpointError, match="differ by layer type"):
        config(rope_parameters={"full_attention": {"rope_theta": 1e4}})


def test_eos_ids_of_both_files():
    assert config({"eos_token_id": [5, 2]}, eos_token_id=2).eos_token_ids == (2, 5)
    assert config({"eos_token_id": 7}, eos_token_id=[2, 3]).eos_token_ids == (2, 3, 7)
    assert config().eos_token_ids == ()
    assert config({"pad_token_id": 9}, bos_token_id=1).bos_token_id == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["FooForCausalLM"]}, "(?s)FooForCausalLM.*LlamaForCausalLM, MistralForCausalLM"),
        ({"quantization_config": {"quant_method": "gptq"}}, "(?s)quantization_config.*gptq"),
        ({"hidden_act": "xielu"}, "(?s)hidden_act 'xielu'.*silu"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"num_key_value_heads": 3}, "(?s)8 query heads, 3 key/value heads"),
        ({"vocab_size": -1}, "vocab_size = -1"),
        ({"vocab_size": "many"}, "vocab_size = 'many'"),
        ({"head_dim": 7}, "head_dim = 7"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window = 0"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(CheckpointError, match=message):
        config(**changes)


def test_missing_key_and_files(tmp_path):
    raw = dict(BASE)
    del raw["hidden_size"]
    with pytest.raises(CheckpointError, match="'hidden_size' is missing"):
        ModelConfig.from_dict(raw)
    with pytest.raises(CheckpointError, match="no model folder"):
        ModelConfig.from_folder(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no config.json"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (3,)


@needs_root
def test_a_folder_of_another_user():
    """Python raises where it may not look; both are places that a job names."""
    with secret_folder() as secret:
        (secret / "model").mkdir()
        with another_user():
            with pytest.raises(CheckpointError, match="no permission"):
                ModelConfig.from_folder(secret / "model")
            assert nearest_folder(secret / "model" / "run") == secret


@needs_root
def test_a_generation_config_that_may_not_be_seen():
    """It says where texts end, so going on without it would be another run."""
    with secret_folder() as secret:
        (secret / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
        model = secret.parent / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(BASE))
        (model / "generation_config.json").symlink_to(secret / "generation_config.json")
        assert ModelConfig.from_folder(model).eos_token_ids == (3,)
        with another_user(), pytest.raises(CheckpointError, match="no permission"):
            ModelConfig.from_folder(model)


def test_heads_over_ranks():
    assert [heads_per_rank(8, 2, tp) for tp in (1, 2, 4, 8)] == [(8, 2), (4, 1), (2, 1), (1, 1)]
    assert heads_per_rank(12, 4, 12) == (1, 1)
    with pytest.raises(ConfigError, match=r"(?s)tp = 3.*8 query heads, 2 key/value heads.*2 or 4 \(all: 1, 2, 4, 8\)"):
        heads_per_rank(8, 2, 3)
    with pytest.raises(ConfigError, match="nearest valid tp: 2 or 4"):
        heads_per_rank(12, 4, 3)  # 3 divides the query heads only
    with pytest.raises(ConfigError, match="nearest valid tp: 8 "):
        config().check_tp(16)


def test_no_torch():
    """Verbs that need no model read configs without importing torch."""
    modules = "hpcinfer.config.model, hpcinfer.models.footprint, hpcinfer.kvcache.layout"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("Mistral", {}), ("Mistral", {"sliding_window": None}), ("Mistral", {"sliding_window": 4, "layer_types": ["full_attention"] * 3}),
        ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1}), ("Qwen2", {}), ("Qwen3", {}), ("Llama", {}),
    ],
)
def test_missing_keys_mean_what_they_mean_to_transformers(family, values):
    import transformers

    raw = {
        "architectures": [f"{family}ForCausalLM"], "vocab_size": 10, "hidden_size": 64, "intermediate_size": 8,
        "num_hidden_layers": 3, "num_attention_heads": 32, **values,
    }
    config = ModelConfig.from_dict(raw)
    wanted = getattr(transformers, f"{family}Config")(**raw)
    assert config.max_position_embeddings == wanted.max_position_embeddings
    assert config.num_kv_heads == wanted.num_key_value_heads
    types = getattr(wanted, "layer_types", None)
    window = getattr(wanted, "sliding_window", None)
    expected = [window if not types or kind == "sliding_attention" else None for kind in types or [""] * 3]
    assert list(config.sliding_window) == expected


def test_scaling_added_beside_rope_parameters_counts_alone():
    raw = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 10, "hidden_size": 64, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "rope_scaling": {"type": "linear", "factor": 4.0},
    }
    config = ModelConfig.from_dict(raw)
    assert (config.rope.type, config.rope.factor, config.rope.theta) == ("linear", 4.0, 10000.0)
