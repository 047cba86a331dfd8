"""GPT-2 checkpoints: both ways to name the tensors, transposed and fused projections, and what is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from hpcinfer.attention.naive import NaiveBackend
from hpcinfer.comm.bootstrap import local_world
from hpcinfer.comm.local import LocalCommunicator
from hpcinfer.config.model import ModelConfig
from hpcinfer.errors import CheckpointError
from hpcinfer.models.checkpoint import Checkpoint
from hpcinfer.models.gpt2 import Gpt2Stage
from hpcinfer.models.weights import load_stage
from hpcinfer.parallel.axes import StageAxes
from tests.checkpoints import make_checkpoint
from tests.unit.layers.lockstep import LockstepCommunicator


def load(folder, *, rank: int = 0, tp: int = 1, layers: range = range(3)) -> Gpt2Stage:
    comm = LocalCommunicator("tp") if tp == 1 else LockstepCommunicator(rank, tp)
    model = Gpt2Stage(
        ModelConfig.from_folder(folder), layers=layers, axes=StageAxes(tp=comm), backend=NaiveBackend(),
        dtype=torch.float32, device=torch.device("cpu"),
    )
    load_stage(model, Checkpoint(folder), local_world())
    return model


def rewrite(folder, change) -> None:
    """Apply `change` to the dict of tensors."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("saved"), "gpt2")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("published"), "gpt2", as_published=True)


def test_both_namings_load_the_same(saved, published):
    assert "transformer.h.0.ln_1.bias" in load_file(saved / "model.safetensors")
    names = set(load_file(published / "model.safetensors"))
    assert {"h.0.ln_1.bias", "h.1.attn.bias", "h.1.attn.masked_bias"} <= names
    assert not any(name.startswith("transformer.") for name in names) and "lm_head.weight" not in names
    one, other = load(saved), load(published)
    assert torch.equal(one.layers[1].attention.qkv.weight, other.layers[1].attention.qkv.weight)
    assert torch.equal(one.positions.weight, other.positions.weight)
    assert one.head.weight.data_ptr() == one.embedding.weight.data_ptr()


@pytest.mark.parametrize("tp", [1, 3, 12])
def test_shards_of_the_fused_projection(saved, tp):
    full = load_file(saved / "model.safetensors")
    weight, bias = full["transformer.h.2.attn.c_attn.weight"], full["transformer.h.2.attn.c_attn.bias"]
    q, k, v = (torch.cat(parts) for parts in zip(*[
        load(saved, rank=rank, tp=tp).layers[2].attention.qkv.weight.chunk(3) for rank in range(tp)
    ]))
    assert torch.equal(torch.cat((q, k, v)).t(), weight)
    q, k, v = (torch.cat(parts) for parts in zip(*[
        load(saved, rank=rank, tp=tp).layers[2].attention.qkv.bias.chunk(3) for rank in range(tp)
    ]))
    assert torch.equal(torch.cat((q, k, v)), bias)


def test_padding_is_zero(saved):
    """67 columns over 12 ranks are 6 each: the last rank has one."""
    mlp = load(saved, rank=11, tp=12).layers[0].mlp
    full = load_file(saved / "model.safetensors")
    assert torch.equal(mlp.up.weight[0], full["transformer.h.0.mlp.c_fc.weight"][:, 66])
    assert torch.equal(mlp.down.weight[:, 0], full["transformer.h.0.mlp.c_proj.weight"][66])
    assert not mlp.up.weight[1:].any() and not mlp.up.bias[1:].any() and not mlp.down.weight[:, 1:].any()


def test_positions_are_kept_by_the_first_rank_of_the_first_stage(saved):
    assert load(saved, rank=0, tp=2).positions.weight.shape == (256, 48)
    assert load(saved, rank=1, tp=2).positions.weight is None
    assert load(saved, layers=range(1, 3)).positions is None


def test_a_prefix_on_the_masks_too(published, tmp_path):
    make_checkpoint(tmp_path, "gpt2", as_published=True)

    def change(tensors):
        for name in list(tensors):
            tensors[f"transformer.{name}"] = tensors.pop(name)

    rewrite(tmp_path, change)
    assert torch.equal(load(tmp_path).norm.bias, load(published).norm.bias)


def test_wrong_tensors_are_named(tmp_path):
    make_checkpoint(tmp_path, "gpt2")

    def change(tensors):
        del tensors["transformer.h.0.ln_1.bias"]
        tensors["transformer.h.0.attn.biased"] = torch.ones(1)
        tensors["transformer.h.1.mlp.c_fc.weight"] = tensors["transformer.h.1.mlp.c_fc.weight"].t().contiguous()

    rewrite(tmp_path, change)
    with pytest.raises(CheckpointError) as error:
        load(tmp_path)
    text = str(error.value)
    assert "1 missing: h.0.ln_1.bias" in text and "1 not part of the model: h.0.attn.biased" in text
    assert "h.1.mlp.c_fc.weight (67, 48) instead of (48, 67)" in text


def test_a_tensor_under_both_names(tmp_path):
    make_checkpoint(tmp_path, "gpt2")
    rewrite(tmp_path, lambda tensors: tensors.update({"wpe.weight": torch.ones(256, 48)}))
    with pytest.raises(CheckpointError, match="(?s)same one of the model.*transformer.wpe.weight and wpe.weight"):
        load(tmp_path)


def test_untied_head(tmp_path):
    make_checkpoint(tmp_path, "gpt2", tie_word_embeddings=False)
    model = load(tmp_path)
    assert torch.equal(model.head.weight, load_file(tmp_path / "model.safetensors")["lm_head.weight"])
    assert model.head.weight.data_ptr() != model.embedding.weight.data_ptr()
