"""Small random Hugging Face checkpoints, written by transformers itself: what parity is measured against.

Weights are large (initializer_range 0.3), so that attention, windows and position embeddings change the logits by far
more than the tolerances of the tests.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

# family -> (config class, model class, overrides of COMMON)
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 16}),
    "gpt2": (
        "GPT2Config", "GPT2LMHeadModel",
        {"hidden_size": 48, "num_attention_heads": 12, "n_inner": 67, "tie_word_embeddings": True},
    ),
    "mixtral": (
        "MixtralConfig", "MixtralForCausalLM",
        {"intermediate_size": 29, "num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 8},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM",
        {"moe_intermediate_size": 21, "num_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": True,
         "head_dim": 8},
    ),
    # Sizes that MXFP4's blocks of 32 divide.
    "gpt_oss": (
        "GptOssConfig", "GptOssForCausalLM",
        {"intermediate_size": 64, "num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 16,
         "sliding_window": 6},
    ),
}
_COMMON: dict[str, Any] = {
    "vocab_size": 211, "hidden_size": 32, "intermediate_size": 67, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "tie_word_embeddings": False, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32,
}
GPT_OSS_ROPE = {**YARN_ROPE, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-kv1-tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-head-dim": ("llama", {"head_dim": 24, "rope_parameters": LLAMA3_ROPE}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "llama-linear-rope": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "llama-yarn-rope": ("llama", {"rope_parameters": YARN_ROPE}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-window-tied": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "tie_word_embeddings": True}
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-bias-tied": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mixtral": ("mixtral", {}),
    "mixtral-window": ("mixtral", {"sliding_window": 7, "num_experts_per_tok": 1}),
    "qwen3-moe": ("qwen3_moe", {"mlp_only_layers": [1]}),
    "qwen3-moe-sparse-step": (
        "qwen3_moe",
        {"decoder_sparse_step": 2, "norm_topk_prob": False, "attention_bias": True, "use_sliding_window": True,
         "sliding_window": 9, "tie_word_embeddings": True},
    ),
    "gpt-oss": ("gpt_oss", {"rope_parameters": GPT_OSS_ROPE}),
    "gpt-oss-mxfp4": ("gpt_oss", {"rope_parameters": GPT_OSS_ROPE, "mxfp4": True}),
    "gpt2": ("gpt2", {}),
    "gpt2-as-published": ("gpt2", {"as_published": True}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False, "activation_function": "relu", "n_inner": None}),
}
"""Name of a checkpoint -> (family, overrides): every feature of the families at least once."""


def make_checkpoint(
    folder: str | Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | None = None,
    tokenizer: bool = False,
    as_published: bool = False,
    mxfp4: bool = False,
    **overrides: Any,
) -> Path:
    """Write a random checkpoint with transformers.

    Args:
        folder: made when it is missing.
        family: a key of _FAMILIES.
        seed: of the weights.
        dtype: of the weights in the files.
        max_shard_size: for example "20KB": several files with an index. None: one file.
        tokenizer: also write a byte-level tokenizer.json (needs a vocabulary of 259 or more).
        as_published: names and masks as in the checkpoint that the authors of GPT-2 published.
        mxfp4: gpt-oss with random packed experts in place of the plain ones.
        overrides: of the transformers config.

    Returns:
        The folder.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder = Path(folder)
    config_name, model_name, family_overrides = _FAMILIES[family]
    values = {**_COMMON, **family_overrides, **overrides}
    config = getattr(transformers, config_name)(**values)
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers starts norms at 1 and biases at 0, where a wrong one would not show.
            if name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("sinks"):
                parameter.normal_(1.0, 2.0)
            elif name.endswith((".bias", "_bias")):
                parameter.normal_(0.0, values["initializer_range"])
    model.to(dtype).save_pretrained(folder, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
    if as_published:
        _publish_gpt2(folder, values["num_hidden_layers"], values["max_position_embeddings"])
    if mxfp4:
        _pack_experts(folder, seed)
    if tokenizer:
        write_byte_tokenizer(folder)
    return folder


def make_variant(folder: str | Path, variant: str, **overrides: Any) -> Path:
    """Write the checkpoint `variant` of VARIANTS."""
    family, values = VARIANTS[variant]
    return make_checkpoint(folder, family, **{**values, **overrides})


def _publish_gpt2(folder: Path, num_layers: int, num_positions: int) -> None:
    """Rename the tensors of a GPT-2 folder, and add the causal masks, as in the published checkpoint."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor.clone() for name, tensor in load_file(path).items()}
    mask = torch.ones(num_positions, num_positions).tril()[None, None]
    for layer in range(num_layers):
        tensors[f"h.{layer}.attn.bias"] = mask.bool() if layer else mask.clone()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, path, metadata={"format": "pt"})


def _pack_experts(folder: Path, seed: int) -> None:
    """Replace the experts of a gpt-oss folder by random MXFP4 blocks and scales."""
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(seed)
    path = folder / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(path).items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            num, columns, rows = tensor.shape
            shape = (num, rows, columns // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
            # 2**-5 to 2**-2, times up to 6.
            tensors[f"{name}_scales"] = torch.randint(122, 126, shape, dtype=torch.uint8, generator=generator)
        else:
            tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    }
    (folder / "config.json").write_text(json.dumps(config))


def load_reference(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model of a folder, with eager attention and experts."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    packed = "mxfp4" in (Path(folder) / "config.json").read_text()
    extra = {"quantization_config": transformers.Mxfp4Config(dequantize=True)} if packed else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", **extra
    ).eval()
    if hasattr(model, "set_experts_implementation"):
        # The default wants sizes that are multiples of 16 bytes.
        model.set_experts_implementation("eager")
    return model


def write_byte_tokenizer(folder: str | Path) -> None:
    """Write tokenizer.json: ids 0 to 2 are <pad>, <s>, </s>, and 3 + b is byte b."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = _byte_alphabet()
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    vocabulary.update({alphabet[byte]: 3 + byte for byte in range(256)})
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (Path(folder) / "tokenizer_config.json").write_text(
        json.dumps({**special, "tokenizer_class": "PreTrainedTokenizerFast"})
    )


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
