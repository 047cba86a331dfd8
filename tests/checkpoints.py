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
    **overrides: Any,
) -> Path:
    """Write a random checkpoint with transformers.

    Args:
        folder: made when it is missing.
        family: llama, mistral, qwen2 or qwen3.
        seed: of the weights.
        dtype: of the weights in the files.
        max_shard_size: for example "20KB": several files with an index. None: one file.
        tokenizer: also write a byte-level tokenizer.json (needs a vocabulary of 259 or more).
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
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith(".bias"):
                parameter.normal_(0.0, values["initializer_range"])
    model.to(dtype).save_pretrained(folder, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
    if tokenizer:
        write_byte_tokenizer(folder)
    return folder


def make_variant(folder: str | Path, variant: str, **overrides: Any) -> Path:
    """Write the checkpoint `variant` of VARIANTS."""
    family, values = VARIANTS[variant]
    return make_checkpoint(folder, family, **{**values, **overrides})


def load_reference(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model of a folder, with eager attention."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


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
