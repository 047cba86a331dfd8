"""Memory arithmetic of models with mixtures against tensors that really exist, in every place for the experts."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import torch

from hpcinfer.attention.sdpa import SdpaBackend
from hpcinfer.comm.local import LocalCommunicator
from hpcinfer.config.model import ModelConfig
from hpcinfer.errors import ConfigError
from hpcinfer.models import footprint
from hpcinfer.models.base import StageModel
from hpcinfer.models.random_weights import fill_random
from hpcinfer.models.registry import model_class
from hpcinfer.parallel.axes import StageAxes
from tests.unit.layers.lockstep import LockstepCommunicator

CPU = torch.device("cpu")
MIXTRAL = ModelConfig(
    family="MixtralForCausalLM", vocab_size=211, hidden_size=24, intermediate_size=29, num_layers=3, num_heads=4,
    num_kv_heads=2, head_dim=8, num_experts=5, experts_per_token=2, expert_size=29, router="softmax_topk",
)
CONFIGS = {
    "mixtral": MIXTRAL,
    "qwen3-moe": dataclasses.replace(
        MIXTRAL, family="Qwen3MoeForCausalLM", qk_norm=True, intermediate_size=50, moe_layers=(True, False, True)
    ),
    "gpt-oss": dataclasses.replace(
        MIXTRAL, family="GptOssForCausalLM", hidden_size=32, expert_size=64, router="topk_softmax", router_bias=True,
        expert_bias=True, swiglu_limit=7.0, attention_sinks=True, qkv_bias=True, o_bias=True, expert_format="mxfp4",
    ),
}
OWNERS = ("hpcinfer.layers", "hpcinfer.models")
# tp, lanes, ep
PLACES = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (2, 1, 2), (4, 1, 4), (1, 2, 2), (2, 2, 4), (2, 3, 6), (2, 2, 1), (2, 2, 2)]


def make(
    config: ModelConfig, layers: range, *, tp: int = 1, lanes: int = 1, ep: int = 1, rank: int = 0
) -> StageModel:
    """The stage of tp rank `rank` of lane 0."""
    comm = LockstepCommunicator(rank, tp) if tp > 1 else LocalCommunicator("tp")
    spread = {1: LocalCommunicator("ep"), tp: comm}.get(ep) or LockstepCommunicator(rank, tp * lanes, "ep")
    axes = StageAxes(tp=comm, ep=spread)
    return model_class(config)(
        config, layers=layers, axes=axes, backend=SdpaBackend(), dtype=torch.bfloat16, device=CPU
    )


def stored(thing: object, seen: dict[int, int]) -> int:
    """Bytes of all weights that an object of the package holds, each storage once."""
    if not isinstance(thing, (list, tuple)):
        thing = (thing if isinstance(thing, dict) else vars(thing)).values()
    for value in thing:
        if isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.uint8):
            seen[value.data_ptr()] = value.nbytes
        elif isinstance(value, (list, tuple, dict)) or type(value).__module__.startswith(OWNERS):
            stored(value, seen)
    return sum(seen.values())


@pytest.mark.parametrize("layers", [range(3), range(1), range(1, 3)])
@pytest.mark.parametrize(("tp", "lanes", "ep"), PLACES)
@pytest.mark.parametrize("name", CONFIGS)
def test_weight_bytes(name, tp, lanes, ep, layers):
    sizes = [stored(make(CONFIGS[name], layers, tp=tp, lanes=lanes, ep=ep, rank=rank), {}) for rank in range(tp)]
    assert footprint.weight_bytes(CONFIGS[name], layers, tp, 2, ep=ep) == sizes[0] == max(sizes)


@pytest.mark.parametrize(("tp", "lanes", "ep"), [(1, 1, 1), (2, 1, 2), (2, 2, 4)])
def test_packed_experts(tp, lanes, ep):
    config = dataclasses.replace(CONFIGS["gpt-oss"], packed_experts=True)
    model = make(config, range(2), tp=tp, lanes=lanes, ep=ep)
    assert footprint.weight_bytes(config, range(2), tp, 2, ep=ep) == stored(model, {})


def test_packed_experts_are_not_split():
    config = dataclasses.replace(CONFIGS["gpt-oss"], packed_experts=True)
    with pytest.raises(ConfigError, match="ep = 2"):
        make(config, range(2), tp=2)
    with pytest.raises(ConfigError, match="plain expert weights"):
        make(dataclasses.replace(config, expert_format=""), range(2))


def test_layer_cost_counts_the_active_experts():
    config = CONFIGS["qwen3-moe"]
    mixture, dense = (footprint.layer_cost(config, layer) for layer in (0, 1))
    assert dense == footprint.layer_parameters(config, layer=1)
    every = dataclasses.replace(config, experts_per_token=config.num_experts)
    assert mixture < footprint.layer_cost(every, 0) == footprint.layer_parameters(every, layer=0)
    assert footprint.layer_cost(config, 0, tp=2) < mixture


def test_expert_work_is_what_the_experts_hold():
    """The tensors that are alive at once while a rank computes all experts are within the estimate."""
    from torch.utils._python_dispatch import TorchDispatchMode

    config, tokens = CONFIGS["mixtral"], 200
    model = make(config, range(1))
    fill_random(model)
    mlp = model.layers[0].mlp
    x = torch.randn(tokens, config.hidden_size).bfloat16()
    ids, weights = mlp.router.forward(x)
    alive: list[weakref.ref] = []
    peak = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal peak
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype != torch.int64:
                alive.append(weakref.ref(result))
            living = [t.untyped_storage() for r in alive if (t := r()) is not None]
            storages = {storage.data_ptr(): storage.nbytes() for storage in living}
            peak = max(peak, sum(storages.get(pointer, 0) for pointer in storages.keys() - held))
            return result

    held = {t.untyped_storage().data_ptr() for t in (mlp.experts.gate_up, mlp.experts.down, x, weights)}
    with Watch():
        mlp.experts.forward(x, ids, weights)
    estimate = footprint.expert_work_bytes(config, tokens, 1, 1, 2)
    assert peak < estimate < 3 * peak
    assert footprint.activation_bytes(config, tokens, 1, 2) > estimate
    assert footprint.expert_work_bytes(config, tokens, 2, 4, 2) > footprint.expert_work_bytes(config, tokens, 2, 2, 2)
