"""Models with mixtures of experts over several ranks equal transformers (float32); one rank is in test_parity.

Tolerance as there. Sinks, MXFP4 and expert counts are checked here too.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hpcinfer.attention.sdpa import SdpaBackend
from hpcinfer.config.model import ModelConfig
from hpcinfer.errors import CheckpointError
from hpcinfer.kernels.mxfp4 import unpack
from hpcinfer.models.random_weights import fill_random
from hpcinfer.runner.summary import expert_balance
from tests.checkpoints import load_reference, make_variant
from tests.unit.models.stages import Replica, build_stages, max_logit_error, mixed, references

TOLERANCE = 1e-4
LENS = (29, 11, 1, 17)
# Six query heads, which three ranks divide.
THREE = {"num_attention_heads": 6, "num_key_value_heads": 3}
LAYOUTS = [
    # variant, overrides, tp, ep, sequence form, stages
    ("mixtral", {}, 2, 1, False, 1),
    ("mixtral", {}, 2, 2, False, 2),
    ("mixtral-window", THREE, 3, 3, True, 1),
    ("mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1}, 4, 4, False, 1),  # fewer experts than ranks
    ("mixtral", {"intermediate_size": 3}, 4, 1, False, 1),  # the last rank's slices are padding only
    ("qwen3-moe", {}, 2, 1, True, 2),
    ("qwen3-moe", {}, 2, 2, False, 1),
    ("qwen3-moe-sparse-step", THREE, 3, 1, False, 3),
    ("qwen3-moe-sparse-step", {}, 4, 4, False, 1),  # 7 experts on 4 ranks
    ("gpt-oss", {}, 2, 1, False, 1),
    ("gpt-oss", {}, 4, 4, True, 2),  # 6 experts on 4 ranks, K/V heads replicated
    ("gpt-oss", THREE, 3, 1, False, 1),
    ("gpt-oss-mxfp4", THREE, 3, 1, False, 1),  # slices that cut blocks of 32
    ("gpt-oss-mxfp4", {}, 2, 2, False, 1),
]
ALWAYS = (1, 5, 8, 12)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(variant, overrides) -> (folder, sequences, logits of transformers)."""
    return references(lambda: tmp_path_factory.mktemp("checkpoint"), LENS)


def replica_of(folder, **layout) -> Replica:
    return Replica(build_stages(folder, SdpaBackend, **layout), max_len=max(LENS), num_sequences=len(LENS))


@pytest.mark.parametrize(
    ("variant", "overrides", "tp", "ep", "sequence_form", "num_stages"),
    [pytest.param(*layout, marks=() if index in ALWAYS else pytest.mark.full) for index, layout in enumerate(LAYOUTS)],
)
def test_layouts(reference, variant, overrides, tp, ep, sequence_form, num_stages):
    folder, sequences, wanted = reference(variant, **overrides)
    bounds = {1: [0, 3], 2: [0, 1, 3], 3: [0, 1, 2, 3]}[num_stages]
    stages = [range(a, b) for a, b in zip(bounds, bounds[1:])]
    replica = replica_of(folder, tp=tp, ep=ep, sequence_form=sequence_form, stages=stages)
    assert max_logit_error(replica, sequences, wanted, mixed(LENS)) < TOLERANCE
    config = ModelConfig.from_folder(folder)
    loads = expert_balance(model.expert_load() for ranks in replica.stages for model in ranks)
    assert list(loads) == [str(layer) for layer, is_mixture in enumerate(config.moe_layers) if is_mixture]
    for tokens in loads.values():
        assert len(tokens) == config.num_experts and sum(tokens) == sum(LENS) * config.experts_per_token


def test_a_dense_model_has_no_expert_load(tmp_path):
    stages = build_stages(make_variant(tmp_path, "llama"), SdpaBackend)
    assert stages[0][0].expert_load() == {}


def test_collectives_of_a_step(reference):
    """As many as a dense model has: two reductions a layer, wherever the experts are."""
    folder, sequences, _ = reference("mixtral")
    for ep in (1, 2):
        replica = replica_of(folder, tp=2, ep=ep)
        replica.step({0: sequences[0]})
        wide = ("all_reduce sum", (len(sequences[0]), 32))
        expected = [(*wide, "embedding")]
        for layer in range(3):
            expected += [(*wide, f"layer {layer} o"), (*wide, f"layer {layer} experts")]
        assert [(verb, shape, label) for verb, label, shape, _ in replica.log][:-1] == expected


@pytest.mark.parametrize("variant", ["mixtral", "qwen3-moe", "gpt-oss-mxfp4"])
def test_bfloat16(reference, variant):
    """Errors of typical logits are those of transformers in bfloat16; a near tie may send a token to another expert."""
    folder, sequences, wanted = reference(variant)
    model = load_reference(folder, torch.bfloat16)
    replica = Replica(
        build_stages(folder, SdpaBackend, dtype=torch.bfloat16), max_len=max(LENS), num_sequences=len(LENS)
    )
    with torch.no_grad():
        theirs = [model(torch.from_numpy(tokens)[None]).logits[0, -1].float() for tokens in sequences]
    ours = replica.step(dict(enumerate(sequences)))
    exact = torch.stack([logits[-1] for logits in wanted])
    assert (ours - exact).abs().median() < 2 * (torch.stack(theirs) - exact).abs().median()


# -- MXFP4 -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpacking_equals_transformers(dtype):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.arange(3 * 8 * 4 * 16).to(torch.uint8).view(3, 8, 4, 16)  # every byte
    # Numbers of the type and their powers of two stay normal ones.
    scales = torch.randint(8, 240, (3, 8, 4), dtype=torch.uint8, generator=generator)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype)  # [E, columns, rows]
    assert torch.equal(unpack(blocks, scales, dtype), theirs.transpose(1, 2))


def test_ends_of_the_scale():
    one = torch.full((1, 16), 0x22, dtype=torch.uint8)  # 1.0 everywhere
    for scale, value in ((0, 2.0**-127), (127, 1.0), (254, 2.0**127)):
        values = unpack(one, torch.tensor([scale], dtype=torch.uint8), torch.float32)
        assert torch.equal(values, torch.full((32,), value))
    assert unpack(one, torch.tensor([255], dtype=torch.uint8), torch.float32).isnan().all()


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 2)])
def test_packed_experts_give_the_same_numbers(reference, tp, ep):
    folder, sequences, _ = reference("gpt-oss-mxfp4")
    logits = {}
    for packed in (False, True):
        replica = replica_of(folder, tp=tp, ep=ep, packed_experts=packed)
        experts = replica.stages[0][0].layers[0].mlp.experts
        assert (experts.packed is not None) == packed and (experts.gate_up is None) == packed
        logits[packed] = replica.step(dict(enumerate(sequences)))
    assert torch.equal(logits[True], logits[False])


def test_blocks_and_scales_come_in_any_order(reference):
    folder, sequences, _ = reference("gpt-oss-mxfp4")
    first, second = replica_of(folder), replica_of(folder)
    tensors, model = load_file(folder / "model.safetensors"), second.stages[0][0]
    for names in (sorted(model.weights()), sorted(model.weights(), reverse=True)):
        loaders = model.weights()
        for name in names:
            passing = tensors[name].clone()
            loaders[name](passing)
            passing.zero_()  # as the buffers of a real load are used again
        assert torch.equal(first.step({0: sequences[0]}), second.step({0: sequences[0]}))
        first.context[:] = second.context[:] = 0


def test_packed_weights_of_a_wrong_dtype(tmp_path):
    folder = make_variant(tmp_path, "gpt-oss-mxfp4")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj_scales"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="(?s)wrong dtype.*int8"):
        build_stages(folder, SdpaBackend)


def test_plain_experts_where_the_config_says_packed(tmp_path):
    folder = make_variant(tmp_path, "gpt-oss")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="down_proj_blocks"):
        build_stages(folder, SdpaBackend)


def test_random_packed_model(reference):
    folder, sequences, _ = reference("gpt-oss-mxfp4")
    replica = replica_of(folder)
    fill_random(replica.stages[0][0])
    logits = replica.step({0: sequences[0]})
    assert logits.isfinite().all() and logits.std() > 0.1
