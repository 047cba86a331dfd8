"""Sampling through the engine: texts and tokens as users of transformers and vLLM expect them, also when running ahead."""

from __future__ import annotations

import functools
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import hpcinfer
from hpcinfer.config.job import EngineSection
from hpcinfer.data.stop_text import final_text
from hpcinfer.data.tokenize import Tokenizer
from hpcinfer.engine.requests import RequestBuilder
from hpcinfer.errors import ConfigError, RowError
from hpcinfer.request import FinishReason, SamplingParams, Status
from tests.conftest import ROOT

MODEL = ROOT / "datasets/demo-model"
PROMPTS = ["reverse abcdefgh:", "sort 9 1 5 3:", "17+25=", "reverse aabbcc:"]
ENGINE = EngineSection(max_sequences=3, max_batch_tokens=32, block_size=4, kv_memory="192 KiB")
"""Pages for fewer tokens than three sequences reach: some are preempted."""


@pytest.fixture(scope="module", params=["off", "on"], ids=["", "run ahead"])
def engine(request):
    section = EngineSection(max_sequences=3, max_batch_tokens=32, run_ahead=request.param)
    return hpcinfer.Engine(MODEL, dtype="float32", engine=section)


@pytest.fixture(scope="module")
def by_transformers():
    """(row of PROMPTS, settings of `generate` as text) -> the new tokens."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), Tokenizer(MODEL)

    @functools.cache
    def tokens(row: int, settings: str) -> list[int]:
        ids = torch.tensor([tokenizer.encode(PROMPTS[row]).tolist()])
        return model.generate(ids, do_sample=False, max_new_tokens=24, pad_token_id=0, **json.loads(settings))[0, ids.shape[1] :].tolist()

    return tokens


def answer(engine, prompt: str, **sampling):
    return next(engine.generate([prompt], SamplingParams(**({"max_tokens": 24} | sampling))))


@pytest.mark.parametrize(
    ("sampling", "settings"),
    [
        ({"repetition_penalty": 3.0}, {"repetition_penalty": 3.0}), ({"min_tokens": 15}, {"min_new_tokens": 15}),
        ({"bad_words": ["f", "ba", "5 9"]}, {}),
        ({"logit_bias": {100: -math.inf, 258: 2.5}}, {"sequence_bias": [[[100], -math.inf], [[258], 2.5]]}),
        ({"repetition_penalty": 0.7, "min_tokens": 20, "bad_words": "b"}, {"repetition_penalty": 0.7, "min_new_tokens": 20}),
    ],
)
def test_greedy_tokens_are_those_of_transformers_generate(engine, by_transformers, sampling, settings):
    words = sampling.get("bad_words", ())
    words = [words] if isinstance(words, str) else words
    if words:  # as the documentation of NoBadWordsLogitsProcessor advises: with and without a space before the word
        encode = Tokenizer(MODEL).encode_plain
        settings = settings | {"bad_words_ids": [encode(start + word).tolist() for word in words for start in ("", " ")]}
    found = {g.row: g.token_ids.tolist() for g in engine.generate(PROMPTS, SamplingParams(max_tokens=24, **sampling))}
    assert found == {row: by_transformers(row, json.dumps(settings)) for row in range(len(PROMPTS))}
    assert found != {row: by_transformers(row, "{}") for row in range(len(PROMPTS))}, "the setting had no effect"


@pytest.mark.parametrize(
    ("sampling", "text", "num_tokens"),
    [
        ({"stop": "c"}, " hgfed", 7), ({"stop": ["x", "ed"]}, " hgf", 6), ({"stop": ("ed", "gfe"), "include_stop_str_in_output": True}, " hgfe", 5),
        ({"stop": "h", "min_tokens": 2}, " hgfedcba", 10), ({"stop": "hg", "min_tokens": 2}, " ", 3), ({"stop": " "}, "", 1),
        ({"stop": "hgfedcba"}, " ", 9), ({"stop": "c", "stop_token_ids": [102]}, " hgf", 4), ({"stop": "d", "max_tokens": 6}, " hgfe", 6),
        ({"stop": None, "bad_words": None, "logit_bias": None, "stop_token_ids": None}, " hgfedcba", 10),
    ],
)
def test_a_stop_text_ends_the_generation_and_cuts_the_text(engine, sampling, text, num_tokens):
    generation = answer(engine, "reverse abcdefgh:", **sampling)
    assert (generation.text, generation.finish_reason) == (text, FinishReason.STOP)
    whole = answer(engine, "reverse abcdefgh:").token_ids.tolist()
    assert generation.token_ids.tolist() == whole[:num_tokens], "the tokens up to the one that completes the stop text"


def test_sampled_rows_with_everything_do_not_depend_on_what_runs_beside_them():
    """Alone, in a crowd, preempted and running ahead."""
    sampling = SamplingParams(
        temperature=1.5, top_p=0.95, n=2, seed=5, max_tokens=30, ignore_eos=True, repetition_penalty=1.2, presence_penalty=0.3,
        frequency_penalty=0.2, stop=["pw", "q", "8"], bad_words=["e", "ab"], min_tokens=6, logit_bias={104: 1.0},
    )
    alone, ahead, tight = (
        hpcinfer.Engine(MODEL, dtype="float32", engine=section)
        for section in (EngineSection(max_sequences=1), EngineSection(run_ahead="on"), ENGINE)
    )
    wanted = {g.key: g for g in alone.generate(PROMPTS, sampling)}
    assert {g.finish_reason for g in wanted.values()} == {FinishReason.STOP, FinishReason.LENGTH}
    assert all("e" not in g.text and "ab" not in g.text for g in wanted.values())
    for engine in (ahead, tight):
        assert {g.key: (g.text, g.token_ids.tolist()) for g in engine.generate(PROMPTS, sampling)} == {
            key: (g.text, g.token_ids.tolist()) for key, g in wanted.items()
        }
    assert tight.scheduler.counters.preemptions > 0 and ahead.scheduler.counters.tokens_ahead == 0


def test_running_ahead_what_is_drawn_behind_a_stop_text_is_dropped():
    engine = hpcinfer.Engine(MODEL, dtype="float32", engine=EngineSection(run_ahead="on"))
    texts = {g.row: g.text for g in engine.generate(PROMPTS, SamplingParams(stop=["c", "5"]))}
    assert texts == {0: " hgfed", 1: " 1 3 ", 2: "42", 3: " "}
    counters = engine.scheduler.counters
    assert counters.tokens_ahead > 0 and counters.dropped_tokens >= 3


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"logit_bias": {300: 1.0}}, "token id 300, which is not in the model's vocabulary of 263"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens = 9 is more than max_tokens = 8"),
        ({"logit_bias": {token: -math.inf for token in range(263)}}, "every token is ruled out by"),
    ],
)
def test_sampling_that_cannot_be_done_fails_its_row_alone(engine, sampling, words):
    failed = answer(engine, "1+1=", **sampling)
    assert failed.status is Status.FAILED and words in failed.error
    assert answer(engine, "1+1=").text == "2"


def test_what_needs_text_needs_a_tokenizer():
    builder = RequestBuilder(None, 263)
    for name in ("stop", "bad_words"):
        with pytest.raises(RowError, match=f"{name} needs text"):
            builder.check(SamplingParams(**{name: "x"}))


def test_bad_words_are_both_inside_a_word_and_at_its_start():
    builder = RequestBuilder(Tokenizer(MODEL), 263)
    prompt = Tokenizer(MODEL).encode("1+1=")
    request = builder.build(row=0, prompt_token_ids=prompt, sampling=SamplingParams(bad_words=["ab", " ab", "c"]))
    assert request.bad_words_token_ids == ((97, 98), (32, 97, 98), (99,), (32, 99)) and request.needs_history


@pytest.mark.parametrize(
    "sampling",
    [
        {"stop": ""}, {"stop": ["a", ""]}, {"stop": [1]}, {"bad_words": " "}, {"bad_words": [b"x"]}, {"min_tokens": -1}, {"repetition_penalty": 0},
        {"repetition_penalty": math.inf}, {"presence_penalty": 2.1}, {"frequency_penalty": math.nan}, {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1.5: 1.0}}, {"logit_bias": {"x": 1}}, {"logit_bias": {1: math.nan}}, {"logit_bias": {1: math.inf}},
        {"logit_bias": [1]}, {"logit_bias": {True: 1}}, {"logit_bias": {1: None}}, {"logit_bias": {1: 1e300}},
    ],
)
def test_values_that_cannot_be(sampling):
    (name,) = sampling
    with pytest.raises(ConfigError, match=f"sampling.{name} = "):
        SamplingParams(**sampling)


def test_partial_text_is_whole_and_params_can_be_keys():
    assert final_text(Tokenizer(MODEL), [104, 105], SamplingParams(stop="x")) == "hi"
    assert len({SamplingParams(logit_bias={1: 2.0}), SamplingParams(logit_bias={1: 2.0}), SamplingParams(logit_bias={1: 3.0})}) == 2
