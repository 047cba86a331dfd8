"""Structured output of the engine: every row fulfils its constraint, whatever is in the batch and whatever happens to the row."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

import hpcinfer
from hpcinfer.config.job import EngineSection
from hpcinfer.request import FinishReason, Request, SamplingParams, Status
from tests.checkpoints import make_checkpoint
from tests.conftest import ROOT
from tests.unit.sampling.test_grammar import PERSON, is_person

DEMO = ROOT / "datasets/demo-model"
CASES = {
    "json": ({"structured_json": json.dumps(PERSON)}, is_person),
    "regex": ({"structured_regex": r"(ab|cd){1,3}-\d{2}"}, lambda text: re.fullmatch(r"(ab|cd){1,3}-\d{2}", text)),
    "choice": ({"structured_choice": ("yes", "no", "näh 😀")}, lambda text: text in ("yes", "no", "näh 😀")),
    "grammar": ({"structured_grammar": 'start: "<" inner ">"\ninner: /[a-c]{1,4}/'}, lambda text: re.fullmatch("<[a-c]{1,4}>", text)),
}
PROMPTS = ["12+30=", "reverse abc:", "sort 3 1 2:"]


@pytest.fixture(scope="module", params=["demo", "random"])
def engine(request, tmp_path_factory):
    """The demo model, and a random one whose vocabulary is larger than its tokenizer's."""
    folder = DEMO
    if request.param == "random":
        folder = make_checkpoint(tmp_path_factory.mktemp("model") / "m", tokenizer=True, vocab_size=300)
    return hpcinfer.Engine(folder, dtype="float32", engine=EngineSection(max_sequences=4, max_batch_tokens=32))


def generate(engine, prompts, **sampling) -> dict[tuple[int, int], hpcinfer.Generation]:
    return {g.key: g for g in engine.generate(prompts, SamplingParams(**sampling))}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", CASES)
def test_every_output_fulfils_its_constraint(engine, kind, temperature):
    constraint, holds = CASES[kind]
    made = generate(engine, PROMPTS, temperature=temperature, seed=4, n=2, max_tokens=100, **constraint)
    assert len(made) == 2 * len(PROMPTS)
    for generation in made.values():
        assert (generation.status, generation.finish_reason) == (Status.OK, FinishReason.STOP), generation
        assert holds(generation.text), generation.text
    if temperature:
        assert len({g.text for g in made.values()}) > 1


def test_rows_with_and_without_constraints_do_not_touch_each_other(engine):
    free = {g.row: g for g in engine.generate(PROMPTS, SamplingParams(temperature=1.0, seed=2, max_tokens=12))}
    scheduler, kinds = engine.scheduler, list(CASES)
    alone = {kind: generate(engine, PROMPTS, temperature=1.0, seed=2, max_tokens=60, **CASES[kind][0]) for kind in kinds}
    requests = []
    for row, prompt in enumerate(PROMPTS):
        ids = engine._tokenizer.encode(prompt)
        requests.append(Request(row=row, prompt_token_ids=ids, sampling=SamplingParams(temperature=1.0, seed=2, max_tokens=12)))
        for kind in kinds:
            sampling = SamplingParams(temperature=1.0, seed=2, max_tokens=60, **CASES[kind][0])
            requests.append(Request(row=row, prompt_token_ids=ids, sampling=sampling))
    ended = engine._replica.step(requests)
    while scheduler.num_sequences:
        ended += engine._replica.step([])
    assert len(ended) == len(requests)
    for sequence in ended:
        constraint, row = sequence.request.sampling.constraint, sequence.request.row
        expected = free[row] if constraint is None else alone[constraint.kind][row, 0]
        assert sequence.output_token_ids.tolist() == expected.token_ids.tolist(), constraint


def test_a_row_that_was_cut_short_anywhere_goes_on_to_the_same_text(engine):
    sampling = SamplingParams(temperature=1.0, seed=6, max_tokens=150, **CASES["json"][0])
    undisturbed = {g.row: g.token_ids.tolist() for g in engine.generate(PROMPTS, sampling)}
    replica, resumed = engine._replica, 0
    prompts = [engine._tokenizer.encode(prompt) for prompt in PROMPTS]
    requests = [Request(row=row, prompt_token_ids=ids, sampling=sampling) for row, ids in enumerate(prompts)]
    finished: dict[int, list[int]] = {}
    while requests:
        ended = replica.step(requests)
        for _ in range(7):
            ended += replica.step([])
        ended += replica.step([], drain=True)
        finished |= {e.request.row: e.output_token_ids.tolist() for e in ended if not e.is_cut_short}
        requests = [
            Request(row=e.request.row, prompt_token_ids=e.request.prompt_token_ids, sampling=sampling, output_token_ids=e.output_token_ids)
            for e in ended if e.is_cut_short
        ]
        resumed += sum(len(r.output_token_ids) > 0 for r in requests)
    assert finished == undisturbed and resumed > 5


def test_max_tokens_may_cut_a_structure_short(engine):
    cut = generate(engine, PROMPTS[:1], max_tokens=5, **CASES["json"][0])[0, 0]
    assert (cut.status, cut.finish_reason, len(cut.token_ids)) == (Status.OK, FinishReason.LENGTH, 5)
    assert cut.text.startswith("{")


def test_a_complete_structure_ends_where_no_end_of_sequence_may(engine):
    made = generate(engine, PROMPTS, temperature=1.0, ignore_eos=True, max_tokens=50, structured_choice=("yes", "no"))
    assert {g.text for g in made.values()} <= {"yes", "no"}
    assert all(g.finish_reason is FinishReason.STOP and len(g.token_ids) == len(g.text) for g in made.values())


def test_a_row_with_no_way_on_fails_alone_and_nothing_hangs(engine):
    """An earlier life's tokens that the constraint does not allow, and a structure too short for min_tokens."""
    sampling = SamplingParams(structured_choice=("yes",), max_tokens=9)
    ids = engine._tokenizer.encode("12+30=")
    stray = engine._tokenizer.encode("z")
    requests = [
        Request(row=0, prompt_token_ids=ids, sampling=sampling, output_token_ids=stray),
        Request(row=1, prompt_token_ids=ids, sampling=SamplingParams(structured_choice=("yes",), max_tokens=9, min_tokens=7)),
        Request(row=2, prompt_token_ids=ids, sampling=sampling),
    ]
    ended = engine._replica.step(requests)
    while engine.scheduler.num_sequences:
        ended += engine._replica.step([])
    by_row = {e.request.row: e for e in ended}
    assert "structured output" in by_row[0].error and "after 1 output token" in by_row[0].error
    assert "structured output" in by_row[1].error and "after 3 output tokens" in by_row[1].error
    assert by_row[2].reason is FinishReason.STOP and engine._tokenizer.decode(by_row[2].output_token_ids) == "yes"


def test_a_constraint_that_cannot_be_used_fails_its_rows(engine):
    failed = generate(engine, ["x"], structured_json='{"type":"array","uniqueItems":true}')[0, 0]
    assert failed.status is Status.FAILED and "uniqueItems" in failed.error
    assert generate(engine, ["x"], structured_choice=("yes",))[0, 0].text == "yes"


def test_preempted_rows_go_on_with_their_structure():
    scarce = EngineSection(max_sequences=6, kv_memory="160 KiB", block_size=4, max_context=64)
    engine = hpcinfer.Engine(DEMO, dtype="float32", engine=scarce)
    ample = hpcinfer.Engine(DEMO, dtype="float32", engine=EngineSection(max_sequences=6))
    prompts, sampling = PROMPTS * 3, {"temperature": 1.0, "max_tokens": 30, "structured_regex": "([a-z]{3,5} ){5,8}[0-9]"}
    made, expected = generate(engine, prompts, **sampling), generate(ample, prompts, **sampling)
    assert engine.scheduler.counters.preemptions > 0
    assert {key: g.token_ids.tolist() for key, g in made.items()} == {key: g.token_ids.tolist() for key, g in expected.items()}


@pytest.mark.parametrize("run_ahead", ["on", "off"])
def test_running_ahead_waits_for_the_tokens_of_constrained_rows_alone(run_ahead):
    engine = hpcinfer.Engine(DEMO, dtype="float32", engine=EngineSection(max_sequences=6, run_ahead=run_ahead))
    made = generate(engine, PROMPTS, temperature=1.0, seed=3, max_tokens=60, **CASES["regex"][0])
    assert all(CASES["regex"][1](g.text) for g in made.values())
    assert engine.scheduler.counters.tokens_ahead == 0
    generate(engine, PROMPTS, max_tokens=10)
    assert (engine.scheduler.counters.tokens_ahead > 0) is (run_ahead == "on")


def test_token_ids_without_a_tokenizer(tmp_path):
    engine = hpcinfer.Engine(make_checkpoint(tmp_path / "m"), dtype="float32")
    assert engine._tokenizer is None
    ended = [*engine.generate([[1, 2, 3]], SamplingParams(max_tokens=3))]
    assert ended[0].status is Status.OK
    failed = next(engine.generate([[1, 2, 3]], SamplingParams(structured_choice=("yes",))))
    assert failed.status is Status.FAILED and "no tokenizer.json" in failed.error
    assert np.array_equal(next(engine.generate([[1, 2, 3]], SamplingParams(max_tokens=3))).token_ids, ended[0].token_ids)
