"""Memory arithmetic against tensors that really exist; random weights that are the same in every layout."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hpcinfer.attention.sdpa import SdpaBackend
from hpcinfer.comm.local import LocalCommunicator
from hpcinfer.config.model import ModelConfig
from hpcinfer.models import footprint
from hpcinfer.models.base import StageModel
from hpcinfer.models.random_weights import fill_random
from hpcinfer.models.registry import model_class
from hpcinfer.parallel.axes import StageAxes
from tests.unit.layers.lockstep import LockstepCommunicator
from tests.unit.models.stages import Replica

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    family="LlamaForCausalLM", vocab_size=211, hidden_size=24, intermediate_size=67, num_layers=3, num_heads=4,
    num_kv_heads=2, head_dim=8, max_position_embeddings=64,
)
CONFIGS = {
    "plain": CONFIG,
    "everything": dataclasses.replace(CONFIG, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True, head_dim=10),
    "tied": dataclasses.replace(CONFIG, tie_word_embeddings=True),
    "gpt2": dataclasses.replace(
        CONFIG, family="GPT2LMHeadModel", num_kv_heads=4, head_dim=6, norm="layer", rope=None, learned_positions=True,
        gated_mlp=False, hidden_act="gelu_tanh", qkv_bias=True, o_bias=True, mlp_bias=True, tie_word_embeddings=True,
    ),
}


def make(config: ModelConfig, layers: range, rank: int = 0, tp: int = 1) -> StageModel:
    comm = LocalCommunicator("tp") if tp == 1 else LockstepCommunicator(rank, tp)
    return model_class(config)(
        config, layers=layers, axes=StageAxes(tp=comm), backend=SdpaBackend(), dtype=torch.bfloat16, device=CPU
    )


def stored(thing: object, seen: dict[int, int]) -> int:
    """Bytes of all weights that an object of the package holds, each storage once."""
    for value in thing if isinstance(thing, list) else vars(thing).values():
        if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16:
            seen[value.data_ptr()] = value.nbytes
        elif isinstance(value, list) or type(value).__module__.startswith(("hpcinfer.layers", "hpcinfer.models")):
            stored(value, seen)
    return sum(seen.values())


@pytest.mark.parametrize("layers", [range(3), range(1), range(1, 2), range(1, 3)])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_weight_bytes(name, tp, layers):
    model = make(CONFIGS[name], layers, tp=tp)
    assert footprint.weight_bytes(CONFIGS[name], layers, tp, 2) == stored(model, {})


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_kv_bytes(tp):
    pool = make(CONFIG, range(1, 3), tp=tp).allocate_kv(num_blocks=5, block_size=4)
    assert footprint.kv_bytes_per_token(CONFIG, 2, tp, 2) * 5 * 4 == pool.num_bytes


def test_activations_grow_with_tokens_and_logits():
    base = footprint.activation_bytes(CONFIG, 100, 1, 4)
    assert footprint.activation_bytes(CONFIG, 200, 1, 4) == 2 * base
    assert footprint.activation_bytes(CONFIG, 100, 1, 4, num_logit_rows=100) > base


@pytest.mark.parametrize(
    ("tp", "stages"), [(2, [range(3)]), (1, [range(1), range(1, 3)]), (4, [range(2), range(2, 3)])]
)
@pytest.mark.parametrize("name", ["tied", "gpt2"])
def test_random_model_is_the_same_in_every_layout(name, tp, stages):
    config = CONFIGS[name]

    def logits(tp, stages):
        built = []
        for layers in stages:
            ranks = [
                model_class(config)(
                    config, layers=layers, axes=StageAxes(tp=LockstepCommunicator(rank, tp) if tp > 1 else LocalCommunicator("tp")),
                    backend=SdpaBackend(), dtype=torch.float32, device=CPU,
                )
                for rank in range(tp)
            ]
            for model in ranks:
                fill_random(model, seed=3)
            built.append(ranks)
        return Replica(built, max_len=20, num_sequences=1).step({0: torch.arange(20).numpy()})

    alone = logits(1, [range(3)])
    assert alone.abs().max() < 30 and alone.std() > 0.1
    torch.testing.assert_close(logits(tp, stages), alone, rtol=0, atol=1e-4)
