"""Log-probabilities, scores and embeddings in every layout against Hugging Face transformers, with chunked prefill, preemption and
a resumed row at work."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hpcinfer.data.generations import GenerationFile
from hpcinfer.request import FinishReason, Generation, Status, TokenLogprobs
from tests.checkpoints import load_reference, make_variant
from tests.mpi import NCCL_STAND_IN, run_ranks
from tests.parity.layouts import LAYOUTS
from tests.parity.test_layouts import ENGINE, NUM_BLOCKS, PROMPT_LENS

TOLERANCE = 1e-4
MAX_TOKENS = 12
CASES = [
    pytest.param("llama", ("tp1, run ahead", "tp2, sequence form", "pp2", "sp2", "tp2, captured, two-batch, run ahead"), id="core"),
    pytest.param("llama", ("tp1", "tp2", "tp2, two-batch"), marks=pytest.mark.full, id="plain"),
    pytest.param("mixtral", ("sp2 ep2", "tp2 ep2, sequence form, two-batch"), marks=pytest.mark.full, id="experts"),
    pytest.param(
        "llama", ("pp2 x sp2", "sp2 x tp2, two-batch", "tp2 x pp2", "tp2 x pp2, sequence form, two-batch", "sp2 x tp2, run ahead"),
        marks=pytest.mark.full, id="four ranks",
    ),
    pytest.param("gpt2", ("tp2", "pp3", "sp2"), marks=pytest.mark.full, id="gpt2"),
]


def make_rows(vocab_size: int) -> list[dict]:
    rng = np.random.default_rng(7)
    asked = [
        {"logprobs": 3, "prompt_logprobs": 2}, {"logprobs": 0}, {"prompt_logprobs": 0}, {},
        {"logprobs": 5, "prompt_logprobs": vocab_size},
    ]
    drawn = [{}, {"temperature": 1.0, "seed": 4}, {"repetition_penalty": 1.3, "logit_bias": {"5": 2.0}}]
    generated = [
        {
            "prompt": rng.integers(3, vocab_size, length).tolist(),
            "sampling": {"max_tokens": MAX_TOKENS, "ignore_eos": True, **asked[row % 5], **drawn[row % 3]},
        }
        for row, length in enumerate(PROMPT_LENS[1:] + PROMPT_LENS[:1])
    ]
    tasks = [
        (64, {"kind": "score"}, {}), (33, {"kind": "score"}, {"score_from": 20, "sampling": {"prompt_logprobs": 2}}),
        (2, {"kind": "score"}, {}), (20, {"kind": "score"}, {"score_from": 19}),
        (37, {"kind": "embed", "pooling": "mean"}, {}), (30, {"kind": "embed"}, {}), (18, {"kind": "embed", "pooling": "cls"}, {}),
        *((length, {"kind": "embed", "pooling": "mean", "normalize": False}, {}) for length in (1, 64)),
    ]
    return generated + [
        {"prompt": rng.integers(3, vocab_size, length).tolist(), "sampling": {}, "task": task, **more} for length, task, more in tasks
    ]


def run_layouts(tmp_path: Path, variant: str, names: tuple[str, ...], env: dict | None = None):
    """The reference model, the rows, and the generations of every layout by row."""
    folder = make_variant(tmp_path / "model", variant)
    reference = load_reference(folder)
    rows = make_rows(reference.config.vocab_size)
    layouts = [LAYOUTS[name] for name in names]
    cases = {
        "layouts": layouts, "rows": rows, "engine": ENGINE, "num_blocks": NUM_BLOCKS, "vocab_size": reference.config.vocab_size, "ticks": 9,
    }
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    run_ranks(
        max(layout["ranks"] for layout in layouts), ["tests/parity/findings_rank.py", folder, tmp_path / "cases.json", tmp_path],
        timeout_s=240, env=env,
    ).check()
    found = {}
    for number, name in enumerate(names):
        with GenerationFile(tmp_path / f"{number}.h5") as file:
            found[name] = list(file)
    return reference, rows, found


@pytest.mark.parametrize(("variant", "names"), CASES)
def test_they_equal_transformers(variant, names, tmp_path):
    reference, rows, found = run_layouts(tmp_path, variant, names)
    for name in names:
        assert [generation.row for generation in found[name]] == list(range(len(rows)))
        for row, generation in zip(rows, found[name], strict=True):
            check_row(reference, row, generation, name)


@pytest.mark.full
def test_over_nccl_communicators(tmp_path):
    names = ("tp2, sequence form", "pp2")
    reference, rows, found = run_layouts(tmp_path, "llama", names, NCCL_STAND_IN)
    for name in names:
        for row, generation in zip(rows, found[name], strict=True):
            check_row(reference, row, generation, name)


def check_row(reference, row: dict, generation: Generation, name: str) -> None:
    place = f"{name}, row {generation.row}"
    if "task" in row:
        check_task(reference, row, generation, place)
        return
    assert generation.status is Status.OK and len(generation.token_ids) == MAX_TOKENS, place
    prompt, tokens = row["prompt"], generation.token_ids.tolist()
    with torch.no_grad():
        expected = torch.log_softmax(reference(torch.tensor([prompt + tokens])).logits[0].double(), dim=-1).numpy()
    check(generation.logprobs, row["sampling"].get("logprobs"), expected[len(prompt) - 1 : -1], tokens, place)
    prompt_logprobs, num_top = generation.prompt_logprobs, row["sampling"].get("prompt_logprobs")
    if prompt_logprobs is not None:
        assert np.isnan(prompt_logprobs.chosen[0]) and (prompt_logprobs.top_ids[0] == -1).all(), place
        prompt_logprobs = prompt_logprobs[1:]
    check(prompt_logprobs, num_top, expected[: len(prompt) - 1], prompt[1:], f"{place}, prompt")


def check_task(reference, row: dict, generation: Generation, place: str) -> None:
    prompt, task, first = row["prompt"], row["task"], row.get("score_from", 1)
    assert generation.status is Status.OK and generation.num_prompt_tokens == len(prompt), f"{place}: {generation.error}"
    assert len(generation.token_ids) == 0 and generation.finish_reason is FinishReason.NONE and generation.logprobs is None, place
    with torch.no_grad():
        output = reference(torch.tensor([prompt]), output_hidden_states=True)
    if task["kind"] == "score":
        expected = torch.log_softmax(output.logits[0].double(), dim=-1).numpy()[np.arange(len(prompt) - 1), prompt[1:]]
        assert generation.score.num_tokens == len(prompt) - first, place
        assert abs(generation.score.logprob - expected[first - 1 :].sum()) < TOLERANCE * len(prompt), place
        assert abs(generation.score.perplexity / np.exp(-expected[first - 1 :].mean()) - 1) < TOLERANCE, place
        if "prompt_logprobs" in row["sampling"]:
            np.testing.assert_allclose(generation.prompt_logprobs.chosen[1:], expected, atol=TOLERANCE, rtol=0, err_msg=place)
        else:
            assert generation.prompt_logprobs is None, place
        return
    hidden = output.hidden_states[-1][0].double().numpy()
    expected = {"mean": hidden.mean(axis=0), "last": hidden[-1], "cls": hidden[0]}[task.get("pooling", "last")]
    if task.get("normalize", True):
        expected = expected / np.linalg.norm(expected)
    assert generation.embedding.dtype == np.float32 and generation.score is None, place
    np.testing.assert_allclose(generation.embedding, expected, atol=TOLERANCE / 10, rtol=1e-4, err_msg=place)


def check(found: TokenLogprobs | None, num_top: int | None, expected: np.ndarray, tokens: list[int], place: str) -> None:
    """found: of `tokens` [T]; expected: [T, V]."""
    assert (found is None) == (num_top is None), place
    if found is None:
        return
    assert found.top.shape == (len(tokens), num_top), place
    np.testing.assert_allclose(found.chosen, expected[np.arange(len(tokens)), tokens], atol=TOLERANCE, rtol=0, err_msg=place)
    best = -np.sort(-expected, axis=1)[:, :num_top]
    np.testing.assert_allclose(found.top, best, atol=TOLERANCE, rtol=0, err_msg=place)
    np.testing.assert_allclose(np.take_along_axis(expected, found.top_ids.astype(np.int64), 1), best, atol=TOLERANCE, rtol=0, err_msg=place)
    assert all(len(set(ids)) == num_top for ids in found.top_ids.tolist()), place
