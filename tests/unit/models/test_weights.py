"""Loading: shards, dtypes, and everything that can be wrong with a folder."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hpcinfer.attention.naive import NaiveBackend
from hpcinfer.comm.bootstrap import local_world
from hpcinfer.comm.local import LocalCommunicator
from hpcinfer.config.model import ModelConfig
from hpcinfer.errors import CheckpointError, ConfigError
from hpcinfer.models.checkpoint import Checkpoint, check_tensors
from hpcinfer.models.llama import LlamaStage
from hpcinfer.models.registry import MODELS, model_class
from hpcinfer.models.weights import load_stage
from hpcinfer.parallel.axes import StageAxes
from tests.checkpoints import make_checkpoint
from tests.unit.layers.lockstep import LockstepCommunicator

CPU = torch.device("cpu")
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def original_sharded(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("sharded"), max_shard_size="20KB")


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture
def sharded(original_sharded, tmp_path):
    return shutil.copytree(original_sharded, tmp_path / "model")


def stage(folder, dtype=torch.float32, layers=None, tp=None) -> LlamaStage:
    config = ModelConfig.from_folder(folder)
    return LlamaStage(
        config, layers=range(config.num_layers) if layers is None else layers, axes=StageAxes(tp=tp or LocalCommunicator("tp")),
        backend=NaiveBackend(), dtype=dtype, device=CPU,
    )


def load(folder, **kwargs) -> LlamaStage:
    model = stage(folder, **kwargs)
    load_stage(model, Checkpoint(folder), local_world())
    return model


def rewrite(folder, change) -> None:
    """Apply `change` to the dict of tensors of a single-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_one_file_and_shards_load_the_same(folder, original_sharded):
    seen = []
    one = stage(folder)
    figures = load_stage(
        one, Checkpoint(folder), local_world(), extent_bytes=10_000,
        progress=lambda figures: seen.append((figures.done_bytes, figures.total_bytes)),
    )
    many = load(original_sharded)
    assert len(list(original_sharded.glob("*.safetensors"))) > 3
    assert torch.equal(one.layers[2].mlp.gate_up.weight, many.layers[2].mlp.gate_up.weight)
    assert torch.equal(one.head.weight, many.head.weight)
    needed = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert seen == [(min(done, needed), needed) for done in range(10_000, needed + 10_000, 10_000)]
    assert figures.read_bytes == figures.done_bytes == needed and figures.seconds > 0


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_dtypes_are_cast(tmp_path, stored, wanted):
    make_checkpoint(tmp_path, dtype=stored)
    weight = load_file(tmp_path / "model.safetensors")["lm_head.weight"]
    assert weight.dtype == stored
    assert torch.equal(load(tmp_path, dtype=wanted).head.weight, weight.to(wanted))


def test_a_stage_takes_its_own_tensors(folder):
    middle = stage(folder, layers=range(1, 2))
    assert all(name.startswith("model.layers.1.") for name in middle.weights())
    assert not middle.is_first and not middle.is_last and middle.embedding is None and middle.head is None
    assert {"model.norm.weight", "lm_head.weight"} <= set(stage(folder, layers=range(2, 3)).weights())


def test_loading_does_not_write_to_the_file(folder):
    before = (folder / "model.safetensors").read_bytes()
    model = load(folder)
    model.head.weight.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def test_harmless_extras(tmp_path):
    make_checkpoint(tmp_path, tie_word_embeddings=True)
    rewrite(tmp_path, lambda tensors: tensors.update({
        "lm_head.weight": torch.ones(211, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)
    }))
    model = load(tmp_path)
    assert model.head.weight.data_ptr() == model.embedding.weight.data_ptr()
    assert not (model.head.weight == 1).all()


def test_missing_extra_and_wrong_shape(folder):
    def change(tensors):
        tensors["model.surprise.weight"] = tensors.pop(NAME)
        tensors["model.norm.weight"] = torch.ones(31)

    rewrite(folder, change)
    with pytest.raises(CheckpointError) as error:
        load(folder)
    text = str(error.value)
    assert f"1 missing: {NAME}" in text
    assert "1 not part of the model: model.surprise.weight" in text
    assert "model.norm.weight (31,) instead of (32,)" in text


def test_a_stage_reports_tensors_of_other_stages(folder):
    rewrite(folder, lambda tensors: tensors.pop(NAME))
    with pytest.raises(CheckpointError, match=NAME):
        load(folder, layers=range(2, 3))


def test_many_names_are_shortened(folder):
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "mlp" in name])
    with pytest.raises(CheckpointError, match="9 missing: .* and 1 more"):
        load(folder)


def test_missing_shard(sharded):
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=f"(?s)1 of .*{victim.name}"):
        Checkpoint(sharded)


def test_index_that_lies(sharded):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    files = sorted(set(content["weight_map"].values()))
    wrong = dict(content["weight_map"])
    wrong[NAME] = next(name for name in files if name != wrong[NAME])
    index.write_text(json.dumps({"weight_map": wrong}))
    with pytest.raises(CheckpointError, match=f"(?s)do not have.*{NAME}"):
        Checkpoint(sharded)
    index.write_text(json.dumps({"weight_map": {NAME: "../model.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        Checkpoint(sharded)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="is damaged"):
        Checkpoint(sharded)


@pytest.mark.parametrize("damage", ["empty", "cut header", "not json", "cut data", "huge header", "bad offsets", "overlap"])
def test_damaged_file(folder, damage):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    bad = json.dumps({**header, "lm_head.weight": {**header["lm_head.weight"], "shape": [3, 3]}}).encode()
    end = header[NAME]["data_offsets"][1]
    both = json.dumps({**header, "second": {"dtype": "F32", "shape": [1], "data_offsets": [end - 4, end]}}).encode()
    path.write_bytes({
        "empty": b"", "cut header": data[:100], "not json": data[:8] + b"x" * length + data[8 + length :],
        "cut data": data[:-5], "huge header": (10**15).to_bytes(8, "little") + data[8:],
        "overlap": len(both).to_bytes(8, "little") + both + data[8 + length :],
        "bad offsets": len(bad).to_bytes(8, "little") + bad + data[8 + length :],
    }[damage])
    with pytest.raises(CheckpointError, match="is damaged or incomplete"):
        Checkpoint(folder)


def test_unaligned_data(folder):
    """Headers need not be padded to a multiple of the dtype's size."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip() + b" "
    header += b" " * (len(header) % 2 == 0)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    assert Checkpoint(folder).entry("model.embed_tokens.weight").start % 4
    assert torch.equal(load(folder).embedding.weight, load_file(path)["model.embed_tokens.weight"])


def test_unsupported_dtype(folder):
    rewrite(folder, lambda tensors: tensors.update({NAME: tensors[NAME].to(torch.float8_e4m3fn)}))
    with pytest.raises(CheckpointError, match=f"(?s){NAME}.*F8_E4M3"):
        load(folder)


def test_pickle_is_never_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="(?s)pickle.*pytorch_model.bin.*save_pretrained"):
        Checkpoint(folder)


def test_no_weights(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="(?s)no weights.*model-00001-of-00002.safetensors without"):
        Checkpoint(folder)
    with pytest.raises(CheckpointError, match="no model folder"):
        Checkpoint(tmp_path / "nowhere")


def test_layout_misfits(folder):
    with pytest.raises(ConfigError, match="(?s)tp = 3.*4 query heads, 2 key/value heads"):
        stage(folder, tp=LockstepCommunicator(0, 3))
    for layers in (range(0), range(2, 4), range(0, 3, 2)):
        with pytest.raises(ConfigError, match="3 layers"):
            stage(folder, layers=layers)


def test_registry_is_what_the_config_promises():
    from hpcinfer.config.model import FAMILIES

    assert set(MODELS) == set(FAMILIES)
    config = ModelConfig(
        family="Other", vocab_size=4, hidden_size=4, intermediate_size=4, num_layers=1, num_heads=1, num_kv_heads=1,
        head_dim=4,
    )
    with pytest.raises(CheckpointError, match="(?s)'Other'.*LlamaForCausalLM"):
        model_class(config)


def test_check_tensors_accepts_every_checkpoint(folder):
    check_tensors(Checkpoint(folder), LlamaStage, ModelConfig.from_folder(folder))
