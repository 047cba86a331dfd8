"""Greedy generation in every layout against Hugging Face transformers, with chunked prefill and preemption at work.

Each variant of every family is written by transformers (random, float32), run through its layouts in one world of MPI ranks,
and compared token for token and logit for logit with transformers' own forward over the same sequences. Every layout
asserts that what it is there for has happened: chunks, preemption, steps in flight, shared prompts, divided steps, transfers.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from hpcinfer.sampling.rng import keyed_uniform
from tests.checkpoints import VARIANTS, load_reference, make_variant
from tests.mpi import NCCL_STAND_IN, run_ranks
from tests.parity.layouts import LAYOUTS, layouts_of
from tests.processors import by_transformers

# 20 pages of 4 tokens a lane for sequences that reach 49 tokens, and microbatches of 16 tokens for prompts of up to 37:
# preemption and chunked prefill must happen in every layout.
ENGINE = {"block_size": 4, "max_batch_tokens": 16, "max_sequences": 8, "max_context": 64}
NUM_BLOCKS = 20
PROMPT_LENS = (1, 37, 12, 23, 5, 30, 18, 2, 9, 33)
MAX_TOKENS = 12
LOGIT_TOLERANCE = 1e-4
"""Logits are 5 to 10 here; another order of float32 sums moves them by about 1e-5, a wrong feature by 1e-1 or more."""
MARGIN = 1e-5
"""Two tokens whose reference logits are closer than this may change places: float32 does not tell them apart."""

ALWAYS = ("llama", "qwen3", "gpt2", "mixtral", "gpt-oss")
CASES = [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.full) for name in VARIANTS]


@pytest.mark.parametrize("variant", CASES)
def test_tokens_and_logits_equal_transformers(variant, tmp_path):
    overrides = {"max_shard_size": "20KB"} if variant == "llama" else {}
    folder = make_variant(tmp_path / "model", variant, **overrides)
    if overrides:
        assert len(list(folder.glob("model-*.safetensors"))) > 1
    reference = load_reference(folder)
    rows = make_rows(reference.config.vocab_size)
    names = layouts_of(variant)
    results = run_cases(tmp_path, folder, rows, names)
    for name in names:
        for row in rows:
            check_row(reference, row, results, name)
        check_counters(name, json.loads(str(results[f"{name}/counters"])))


ON_NCCL = {
    "llama": ("tp2", "pp2", "tp2 x pp2", "tp2, two-batch", "tp2, sequence form", "sp2 x tp2, two-batch"),
    "mixtral": ("tp2 ep2", "sp2 x tp2 ep4, sequence form, two-batch"),
}


@pytest.mark.parametrize("variant", ON_NCCL)
def test_over_nccl_communicators(variant, tmp_path):
    """The same where NcclCommunicator carries the tensors, over a stand-in for cupy.cuda.nccl."""
    folder = make_variant(tmp_path / "model", variant)
    reference = load_reference(folder)
    rows = make_rows(reference.config.vocab_size)[:6]
    results = run_cases(tmp_path, folder, rows, ON_NCCL[variant], env=NCCL_STAND_IN)
    for name in ON_NCCL[variant]:
        for row in rows:
            check_row(reference, row, results, name)
        counters = json.loads(str(results[f"{name}/counters"]))
        axes = [axis for axis in ("tp", "sp", "ep") if LAYOUTS[name]["layout"].get(axis, 1) > 1]
        assert all(counters[f"{axis}_operations"] for axis in axes), counters


def check_counters(name: str, counters: dict[str, int]) -> None:
    """What the layout is there for has happened."""
    layout = LAYOUTS[name]["layout"]
    wanted = set(LAYOUTS[name].get("counters", ("chunked_prefills", "preemptions")))
    if layout.get("sp", 1) > 1:
        wanted |= {"shared_prefills", "local_prefills_under_sp", "sp_operations"}
    if layout.get("two_batch", "off") != "off":
        wanted |= {"divided_steps", "divided_prompts"}
    if layout.get("tp", 1) > 1:
        wanted.add("tp_operations")
    if layout.get("ep", 1) > 1:
        wanted.add("ep_operations")
    if LAYOUTS[name].get("captured"):
        wanted.add("replays")
    missing = sorted(counter for counter in wanted if counters[counter] == 0)
    assert not missing, f"{name}: {missing} did not happen: {counters}"
    in_flight = layout.get("microbatches") or layout.get("pp", 1)
    assert counters["max_in_flight"] == in_flight, f"{name}: steps in flight"


def make_rows(vocab_size: int) -> list[dict]:
    """Half of the rows draw from the model's logits, the others from edited ones: those that no end of sequence cuts short."""
    rng = np.random.default_rng(5)
    edits = {
        1: {"min_tokens": 6}, 2: {"presence_penalty": 1.5, "frequency_penalty": 0.5}, 6: {"repetition_penalty": 1.4},
        4: {"logit_bias": {token: 1.0 for token in range(0, vocab_size, 3)}}, 8: {"repetition_penalty": 0.8, "min_tokens": 3},
    }
    never_twice = [[token, token] for token in range(vocab_size)] + [[token] for token in range(1, vocab_size, 5)]
    return [
        {
            "row": row,
            "prompt": rng.integers(3, vocab_size, length).tolist(),
            "sampling": {"max_tokens": MAX_TOKENS, "ignore_eos": row % 2 == 0, **edits.get(row, {})},
            "bad_words": never_twice if row == 0 else [],
        }
        for row, length in enumerate(PROMPT_LENS)
    ]


def run_cases(tmp_path, folder, rows, names, env=None) -> dict[str, np.ndarray]:
    layouts = {name: LAYOUTS[name] for name in names}
    cases = {"layouts": layouts, "rows": rows, "engine": ENGINE, "num_blocks": NUM_BLOCKS}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    run_ranks(
        max(layout["ranks"] for layout in layouts.values()), ["tests/parity/parity_rank.py", folder, tmp_path / "cases.json", tmp_path / "results.npz"],
        timeout_s=240, env=env,
    ).check()
    with np.load(tmp_path / "results.npz") as stored:
        return dict(stored)


def check_row(reference, row: dict, results: dict[str, np.ndarray], name: str) -> None:
    """Tokens are those of greedy decoding (margin rule), and the logits behind them are the reference's."""
    prompt, tokens = row["prompt"], results[f"{name}/tokens/{row['row']}"].tolist()
    with torch.no_grad():
        logits = reference(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    eos = reference.config.eos_token_id
    for position, token in enumerate(tokens):
        scores = by_transformers(logits[position : position + 1], prompt, tokens[:position], row, ends=[eos])[0]
        gap = (scores.max() - scores[token]).item()
        assert gap < MARGIN, f"{name}, row {row['row']}: token {token} at {position} is {gap} below the reference's best"
    ended = not row["sampling"]["ignore_eos"] and tokens[-1] == eos
    assert ended or len(tokens) == MAX_TOKENS
    assert row["sampling"]["ignore_eos"] or eos not in tokens[:-1]
    uniforms = keyed_uniform([0] * len(tokens), [row["row"]] * len(tokens), [0] * len(tokens), len(prompt) + np.arange(len(tokens)))
    found = np.searchsorted(results[f"{name}/uniforms"], uniforms)
    np.testing.assert_array_equal(results[f"{name}/uniforms"][found], uniforms)
    error = np.abs(results[f"{name}/logits"][found] - logits.numpy()).max()
    assert error < LOGIT_TOLERANCE, f"{name}, row {row['row']}: logits differ by {error}"
