"""The in-process engine: strings or token ids in, generations out as they finish."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import hpcinfer
from hpcinfer.config.job import EngineSection
from hpcinfer.errors import CheckpointError, ConfigError, UsageError
from hpcinfer.request import FinishReason, SamplingParams, Status, TaskParams
from tests.checkpoints import make_checkpoint
from tests.conftest import ROOT

MODEL = ROOT / "datasets/demo-model"


@pytest.fixture(scope="module")
def engine():
    return hpcinfer.Engine(MODEL, engine=EngineSection(max_sequences=4, max_batch_tokens=32))


def test_strings_and_token_ids_give_the_same_answers(engine):
    prompts = ["12+30=", "reverse abc:", "sort 3 1 2:"]
    from_text = {g.row: g for g in engine.generate(prompts)}
    from_ids = {g.row: g for g in engine.generate([list(p.encode()) for p in prompts])}
    assert [from_text[row].text for row in range(3)] == ["42", " cba", " 1 2 3"]
    for row in range(3):
        assert from_ids[row].token_ids.tolist() == from_text[row].token_ids.tolist()
        assert from_text[row].finish_reason is FinishReason.STOP
        assert from_text[row].num_prompt_tokens == len(prompts[row])


def test_generations_come_as_they_finish_from_an_endless_source(engine):
    prompts = (f"{number % 90}+7=" for number in itertools.count())
    first = list(itertools.islice(engine.generate(prompts), 20))
    assert len({g.row for g in first}) == 20
    assert max(g.row for g in first) < 60
    assert [g.text for g in engine.generate(["1+1="])] == ["2"], "the engine is not left in order when a caller stops early"


def test_two_calls_at_once_do_not_mix_their_rows(engine):
    first = engine.generate(["17+25=", "1+1="])
    next(first)
    with pytest.raises(UsageError, match="another call"):
        next(engine.generate(["reverse abc:"]))
    first.close()
    assert [g.text for g in engine.generate(["reverse abc:"])] == [" cba"]


def test_samples_differ_and_do_not_depend_on_the_batch(engine):
    sampling = hpcinfer.SamplingParams(temperature=3.0, n=3, seed=5, max_tokens=12, ignore_eos=True)
    alone = {g.key: g.token_ids.tolist() for g in engine.generate(["9+9="], sampling)}
    crowd = {g.key: g.token_ids.tolist() for g in engine.generate(["9+9=", "sort 5 4:", "reverse xyz:"], sampling)}
    assert len({tuple(tokens) for tokens in alone.values()}) == 3
    assert {key: crowd[key] for key in alone} == alone


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "no tokens"), ([], "no tokens"), (list(range(3)) * 300, "at most 511"), ([5, 263], "vocabulary of 263"),
        ([5, -1], "vocabulary"), ([2**40], "vocabulary"), ([[1, 2]], "sequence of token ids"), ([1, [2]], "sequence of token ids"),
        ([0.5], "sequence of token ids"),
    ],
)
def test_a_prompt_that_cannot_run_fails_alone(engine, prompt, words):
    generations = {g.row: g for g in engine.generate([prompt, "2+2="])}
    assert generations[0].status is Status.FAILED and words in generations[0].error
    assert generations[1].text == "4"


def test_max_tokens_and_stop_tokens_end_a_generation(engine):
    cut = next(engine.generate(["reverse abcdefgh:"], hpcinfer.SamplingParams(max_tokens=3)))
    assert (cut.text, cut.finish_reason) == (" hg", FinishReason.LENGTH)
    stopped = next(engine.generate(["reverse abcdefgh:"], hpcinfer.SamplingParams(stop_token_ids=(ord("f"),))))
    assert (stopped.text, stopped.finish_reason) == (" hgf", FinishReason.STOP)


def test_log_probabilities_score_and_embed_in_this_process(engine):
    (generation,) = engine.generate(["17+25="], SamplingParams(max_tokens=3, logprobs=2, prompt_logprobs=0))
    assert generation.logprobs.top_ids[:, 0].tolist() == generation.token_ids.tolist(), "greedy takes the most likely token"
    (score,) = engine.generate(["17+25="], task=TaskParams(kind="score"))
    assert score.score.num_tokens == score.num_prompt_tokens - 1 and len(score.token_ids) == 0 and score.text == ""
    np.testing.assert_allclose(score.score.logprob, generation.prompt_logprobs.chosen[1:].sum(), rtol=1e-4)
    embedded = list(engine.generate(["17+25=", "sort 3 1:", "x" * 600], task=TaskParams(kind="embed")))
    assert sorted(row.status for row in embedded) == [Status.OK, Status.OK, Status.FAILED]
    for row in embedded:
        assert row.status is Status.FAILED or abs(np.linalg.norm(row.embedding) - 1) < 1e-6


def test_each_token_has_its_log_probability_however_a_row_ends(engine):
    pytest.importorskip("llguidance")
    for ends in ({"stop": (" 3",)}, {"structured_choice": ("yes", "no")}, {"structured_choice": ("yes",), "ignore_eos": True}):
        (generation,) = engine.generate(["sort 3 1 2:"], SamplingParams(logprobs=1, **ends))
        assert generation.status is Status.OK and 0 < len(generation.token_ids) == len(generation.logprobs), ends
        assert np.isfinite(generation.logprobs.chosen).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_answers_the_same(dtype):
    engine = hpcinfer.Engine(MODEL, dtype=dtype)
    prompts = ["12+30=", "reverse hello:", "sort 9 1 5 3:"]
    assert [g.text for g in sorted(engine.generate(prompts), key=lambda g: g.row)] == ["42", " olleh", " 1 3 5 9"]


def test_a_model_without_tokenizer_takes_token_ids(tmp_path):
    engine = hpcinfer.Engine(make_checkpoint(tmp_path, "qwen3"))
    generations = {g.row: g for g in engine.generate([np.array([5, 6, 7]), "text"], hpcinfer.SamplingParams(max_tokens=4))}
    assert generations[0].status is Status.OK and generations[0].text == ""
    assert "no tokenizer.json" in generations[1].error


def test_misfits_are_found_before_weights_are_read(tmp_path):
    with pytest.raises(CheckpointError, match="no model folder"):
        hpcinfer.Engine(tmp_path / "absent")
    with pytest.raises(ConfigError, match="max_position_embeddings = 512"):
        hpcinfer.Engine(MODEL, engine=EngineSection(max_context=4096))
    with pytest.raises(ConfigError, match="no memory for the keys and values"):
        hpcinfer.Engine(MODEL, engine=EngineSection(kv_memory="1 KiB"))
