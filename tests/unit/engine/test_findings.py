"""What the leader puts together of a sequence: also where it was preempted, resumed, or asked for less than its neighbours."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from hpcinfer.engine.findings import Findings
from hpcinfer.engine.outcome import generation_of
from hpcinfer.kernels.logprobs import token_logprobs, unpacked
from hpcinfer.request import FinishReason, Request, SamplingParams, Status, TaskParams
from hpcinfer.scheduler.sequence import EndedSequence

LOGITS = torch.randn(12, 20, generator=torch.Generator().manual_seed(3))
PROMPT = np.arange(1, 9, dtype=np.int32)


def packed(first: int, stop: int, num_top: int) -> np.ndarray:
    """Of tokens first ... stop - 1, after rows first - 1 ... of LOGITS."""
    return token_logprobs(LOGITS[first - 1 : stop - 1], torch.arange(first + 1, stop + 1), num_top).numpy()


def request(task: TaskParams = TaskParams(), **more) -> Request:
    sampling = SamplingParams(**{name: more.pop(name) for name in ("logprobs", "prompt_logprobs") if name in more})
    return Request(row=1, prompt_token_ids=PROMPT, sampling=sampling, task=task, **more)


def ended(findings: Findings, of: Request, num_tokens: int = 1) -> EndedSequence:
    return EndedSequence(
        request=of, output_token_ids=np.arange(num_tokens, dtype=np.int32), reason=FinishReason.LENGTH, findings=findings
    )


def test_a_later_life_adds_to_what_an_earlier_one_found():
    whole = unpacked(packed(1, 7, 2))
    asked = request(logprobs=2, output_logprobs=whole[:2])
    findings = Findings(asked)
    for row in packed(3, 7, 5):  # its neighbours ask for more
        findings.add_drawn(row)
    found = findings.of_output(5)  # one too many was drawn
    np.testing.assert_array_equal(found.chosen, whole.chosen[:5])
    np.testing.assert_array_equal(found.top_ids, whole.top_ids[:5])
    np.testing.assert_array_equal(found.top, whole.top[:5])
    assert findings.of_prompt() is None and Findings(request()).of_output(3) is None


def test_a_prompt_that_is_computed_again_is_found_once():
    findings = Findings(request(prompt_logprobs=1))
    for first, stop in ((1, 4), (4, 6), (1, 3), (3, 8)):  # preempted after 6 tokens, and cut into other chunks then
        findings.add_scored(first, packed(first, stop, 3))
    found, whole = findings.of_prompt(), unpacked(packed(1, 8, 1))
    assert len(found) == 8 and np.isnan(found.chosen[0]) and found.top_ids[0, 0] == -1
    np.testing.assert_array_equal(found.chosen[1:], whole.chosen)
    np.testing.assert_array_equal(found.top_ids[1:], whole.top_ids)


def test_a_score_counts_from_where_it_is_to():
    scored = request(TaskParams(kind="score"), score_from=5)
    findings = Findings(scored)
    findings.add_scored(5, packed(5, 8, 0))
    generation = generation_of(ended(findings, scored), None)
    assert generation.status is Status.OK and generation.score.num_tokens == 3 and len(generation.token_ids) == 0
    assert generation.prompt_logprobs is None and generation.finish_reason is FinishReason.NONE
    np.testing.assert_allclose(generation.score.logprob, unpacked(packed(5, 8, 0)).chosen.sum(dtype=np.float64))


@pytest.mark.parametrize("normalize", [False, True])
def test_sums_that_are_made_again_count_once(normalize):
    hidden = np.random.default_rng(1).normal(size=(8, 4))
    embedded = request(TaskParams(kind="embed", pooling="mean", normalize=normalize))
    findings = Findings(embedded)
    for first, stop in ((0, 3), (3, 6), (2, 5), (0, 2), (5, 8)):
        findings.add_pooled(first, stop, hidden[first:stop].sum(axis=0))
    expected = hidden.mean(axis=0)
    expected = expected / np.linalg.norm(expected) if normalize else expected
    np.testing.assert_allclose(generation_of(ended(findings, embedded), None).embedding, expected, rtol=1e-6)


def test_what_is_no_number_fails_its_row():
    scored, embedded = request(TaskParams(kind="score")), request(TaskParams(kind="embed"))
    one, other = Findings(scored), Findings(embedded)
    one.add_scored(1, packed(1, 4, 0))  # the rest never came
    other.add_pooled(7, 8, np.array([1.0, np.inf]))
    for findings, of in ((one, scored), (other, embedded)):
        generation = generation_of(ended(findings, of), None)
        assert generation.status is Status.FAILED and "not finite numbers" in generation.error and generation.num_prompt_tokens == 8
        drained = dataclasses.replace(ended(findings, of, 0), reason=FinishReason.NONE)
        assert generation_of(drained, None).status is Status.PARTIAL and drained.num_new_tokens == 0
