"""Architecture name of a config.json -> the class that computes it. Keys are those of `config.model.FAMILIES`."""

from __future__ import annotations

from hpcinfer.config.model import ModelConfig
from hpcinfer.errors import CheckpointError
from hpcinfer.models.base import StageModel
from hpcinfer.models.gpt2 import Gpt2Stage
from hpcinfer.models.gpt_oss import GptOssStage
from hpcinfer.models.llama import LlamaStage
from hpcinfer.models.mixtral import MixtralStage
from hpcinfer.models.qwen3_moe import Qwen3MoeStage

MODELS: dict[str, type[StageModel]] = {
    "LlamaForCausalLM": LlamaStage,
    "MistralForCausalLM": LlamaStage,
    "Qwen2ForCausalLM": LlamaStage,
    "Qwen3ForCausalLM": LlamaStage,
    "GPT2LMHeadModel": Gpt2Stage,
    "MixtralForCausalLM": MixtralStage,
    "Qwen3MoeForCausalLM": Qwen3MoeStage,
    "GptOssForCausalLM": GptOssStage,
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
