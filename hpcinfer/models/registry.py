"""Architecture name of a config.json -> the class that computes it. Keys are those of `config.model.FAMILIES`."""

from __future__ import annotations

from hpcinfer.config.model import ModelConfig
from hpcinfer.errors import CheckpointError
from hpcinfer.models.base import StageModel
from hpcinfer.models.llama import LlamaStage

MODELS: dict[str, type[StageModel]] = {
    "LlamaForCausalLM": LlamaStage,
    "MistralForCausalLM": LlamaStage,
    "Qwen2ForCausalLM": LlamaStage,
    "Qwen3ForCausalLM": LlamaStage,
}


def model_class(config: ModelConfig) -> type[StageModel]:
    """The class of the config's family.

    Raises:
        CheckpointError: unknown family; the supported ones are listed.
    """
    found = MODELS.get(config.family)
    if found is None:
        raise CheckpointError(
            f"the architecture {config.family!r} is not supported", fix=f"supported: {', '.join(MODELS)}"
        )
    return found
