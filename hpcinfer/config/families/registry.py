"""Architecture name of a config.json -> how its family is read. Adding a family is one entry."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from hpcinfer.config.families import gpt2, llama, moe

Read = Callable[[str, Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
"""(architecture name, config.json, generation_config.json) -> the fields of a ModelConfig.

Errors are those of reading plain JSON (KeyError: the key is missing; TypeError, ValueError: a wrong value) or a
CheckpointError; the caller adds the name of the file.
"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FamilyReader:
    """How the config.json of one architecture is read."""

    model_type: str
    """Names the architecture where config.json has no `architectures`."""
    read: Read
    quantizations: tuple[str, ...] = ()
    """Values of quantization_config.quant_method that `read` understands; others are refused before it is called."""


READERS: dict[str, FamilyReader] = {
    "LlamaForCausalLM": FamilyReader(model_type="llama", read=llama.read),
    "MistralForCausalLM": FamilyReader(model_type="mistral", read=llama.read),
    "Qwen2ForCausalLM": FamilyReader(model_type="qwen2", read=llama.read),
    "Qwen3ForCausalLM": FamilyReader(model_type="qwen3", read=llama.read),
    "GPT2LMHeadModel": FamilyReader(model_type="gpt2", read=gpt2.read),
    "MixtralForCausalLM": FamilyReader(model_type="mixtral", read=moe.read_mixtral),
    "Qwen3MoeForCausalLM": FamilyReader(model_type="qwen3_moe", read=moe.read_qwen3_moe),
    "GptOssForCausalLM": FamilyReader(model_type="gpt_oss", read=moe.read_gpt_oss, quantizations=("mxfp4",)),
}
