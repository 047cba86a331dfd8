"""The demo task, the prompts shipped with it, and the shape of the trained demo model."""

import importlib.util
import json
import random
import struct
from collections import Counter
from itertools import islice
from pathlib import Path

import h5py
import numpy as np
import pytest

DATASETS = Path(__file__).resolve().parents[3] / "datasets"
MODEL_FOLDER = DATASETS / "demo-model"


def load_demo_task():
    """Imports `demo_task.py` by its path: the folder is no package, and its name is that of a library."""
    spec = importlib.util.spec_from_file_location("demo_task", DATASETS / "demo_task.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


demo_task = load_demo_task()


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATASETS / "demo" / "prompts.jsonl").read_text().splitlines()]


def unpack_texts(group: h5py.Group) -> list[str]:
    data, offsets = group["data"][:].tobytes(), group["offsets"][:]
    return [data[start:end].decode() for start, end in zip(offsets[:-1], offsets[1:], strict=True)]


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("17+25=", "42"),
        ("99+99=", "198"),
        ("0+0=", "0"),
        ("sort 7 3 9 1:", " 1 3 7 9"),
        ("sort 5 0 5:", " 0 5 5"),
        ("reverse abcd:", " dcba"),
        ("reverse q:", " q"),
    ],
)
def test_solve_gives_the_right_answer(prompt, answer):
    assert demo_task.solve(prompt) == answer


@pytest.mark.parametrize("prompt", ["", "17+25", "17+25= ", "sort 12 3:", "sort :", "reverse ABC:", "hello"])
def test_solve_refuses_what_is_no_demo_prompt(prompt):
    with pytest.raises(ValueError, match="not a demo prompt"):
        demo_task.solve(prompt)


@pytest.mark.parametrize("kind", demo_task.PROMPT_KINDS)
def test_each_kind_draws_prompts_of_its_kind_that_can_be_solved(kind):
    rng = random.Random(3)
    prompts = [demo_task.PROMPT_KINDS[kind](rng) for _ in range(300)]
    assert {demo_task.kind_of(prompt) for prompt in prompts} == {kind}
    # One token a byte; <eos> comes on top.
    assert all(1 <= len(demo_task.solve(prompt).encode()) <= 20 for prompt in prompts)


def test_extra_length_goes_past_the_asked_sizes():
    rng = random.Random(9)
    longest = {
        kind: max(len(demo_task.solve(draw(rng, demo_task.EXTRA_TRAINING_LENGTH))) for _ in range(300))
        for kind, draw in demo_task.PROMPT_KINDS.items()
    }
    assert longest == {"add": 3, "sort": 2 * 11, "reverse": 1 + 14}


def test_split_parts_are_disjoint_and_of_the_stated_size():
    rng = random.Random(4)
    prompts = {draw(rng) for draw in demo_task.PROMPT_KINDS.values() for _ in range(3000)}
    share = sum(map(demo_task.is_held_out, prompts)) / len(prompts)
    # About 8500 different prompts: 0.02 is six standard deviations.
    assert share == pytest.approx(1 / demo_task.HELD_OUT_ONE_IN, abs=0.02)

    training = set(islice(demo_task.draw_prompts(random.Random(5), held_out=False), 3000))
    held_out = set(islice(demo_task.draw_prompts(random.Random(5), held_out=True), 3000))
    assert not training & held_out
    assert not any(map(demo_task.is_held_out, training))
    assert all(map(demo_task.is_held_out, held_out))


def test_split_does_not_change():
    """A changed hash would put training prompts among the held-out ones without any other sign."""
    prompts = [f"{left}+{right}=" for left in range(100) for right in range(100)]
    held_out = [prompt for prompt in prompts if demo_task.is_held_out(prompt)]
    assert (len(held_out), held_out[:3]) == (1026, ["0+1=", "0+12=", "0+22="])


def test_draws_follow_the_seed_and_the_weights():
    first = demo_task.draw_unique_prompts(6, 50, held_out=True)
    assert first == demo_task.draw_unique_prompts(6, 50, held_out=True)
    assert first != demo_task.draw_unique_prompts(7, 50, held_out=True)
    assert len(set(first)) == 50
    drawn = islice(demo_task.draw_prompts(random.Random(8), held_out=False, weights={"add": 1.0}), 50)
    assert {demo_task.kind_of(prompt) for prompt in drawn} == {"add"}


def test_shipped_prompts_are_held_out_and_their_answers_right(rows):
    assert len(rows) == 1000
    assert len({row["id"] for row in rows}) == len({row["prompt"] for row in rows}) == 1000
    assert all(demo_task.is_held_out(row["prompt"]) for row in rows)
    assert all(demo_task.solve(row["prompt"]) == row["answer"] for row in rows)
    assert min(Counter(demo_task.kind_of(row["prompt"]) for row in rows).values()) > 250


def test_shipped_h5_has_the_same_rows_as_the_jsonl(rows):
    with h5py.File(DATASETS / "demo" / "prompts.h5") as file:
        assert file.attrs["format"] == "hpcinfer-prompts"
        assert (file.attrs["version"], file.attrs["n_rows"]) == (1, len(rows))
        assert file.attrs["fingerprint"].startswith("sha256:")
        assert (file["prompts/data"].dtype, file["prompts/offsets"].dtype) == (np.dtype("u1"), np.dtype("<i8"))
        assert file["prompts/data"].fletcher32
        for group, column in (("prompts", "prompt"), ("id", "id")):
            assert unpack_texts(file[group]) == [row[column] for row in rows]
        # Columns under /meta hold JSON: any value of the source can be kept.
        assert [json.loads(text) for text in unpack_texts(file["meta/answer"])] == [row["answer"] for row in rows]


def test_model_folder_is_complete_and_small():
    names = {path.name for path in MODEL_FOLDER.iterdir()}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names == wanted
    assert sum(path.stat().st_size for path in MODEL_FOLDER.iterdir()) < 8 * 1024**2


def test_model_config_and_weights_have_the_stated_shapes():
    config = json.loads((MODEL_FOLDER / "config.json").read_text())
    heads, kv_heads, head_dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    assert (config["model_type"], config["vocab_size"], config["hidden_size"]) == ("llama", 263, 128)
    assert (heads, kv_heads, head_dim, config["num_hidden_layers"]) == (4, 2, 32, 4)
    assert config["intermediate_size"] % 4 != 0

    with (MODEL_FOLDER / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__", None)
    assert {tensor["dtype"] for tensor in header.values()} == {"F32"}
    shapes = {name: tensor["shape"] for name, tensor in header.items()}
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == [263, 128]
    assert shapes["model.layers.3.self_attn.k_proj.weight"] == [kv_heads * head_dim, 128]
    assert shapes["model.layers.3.mlp.down_proj.weight"] == [128, config["intermediate_size"]]
    assert "model.layers.4.mlp.down_proj.weight" not in shapes


def test_generation_ends_at_eos():
    generation = json.loads((MODEL_FOLDER / "generation_config.json").read_text())
    tokenizer = json.loads((MODEL_FOLDER / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    assert generation["eos_token_id"] == ids["<eos>"] == 258


@pytest.mark.parametrize("text", ["17+25=", "", " two  spaces\n\ttab", "Grüße, 世界 🙂", "\x00\x7f\u0080\uffff"])
def test_tokenizer_is_one_token_a_byte_and_exact(text):
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(MODEL_FOLDER / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
