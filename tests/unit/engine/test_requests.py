"""What a job's task makes of its requests, and of the identity of its run."""

from __future__ import annotations

import dataclasses

import h5py
import numpy as np
import pytest

from hpcinfer.config.load import job_from_tables
from hpcinfer.data.prompts.prompt_row import PromptRow, sampling_for
from hpcinfer.data.prompts.prompts_writer import PromptsWriter
from hpcinfer.data.prompts.reader import open_prompts
from hpcinfer.engine.requests import RequestBuilder
from hpcinfer.errors import ConfigError, RowError
from hpcinfer.request import Generation, SamplingParams, Status, TaskParams, TokenLogprobs
from hpcinfer.runner.identity import sampling_facts

TABLES = {"model": {"path": "m"}, "data": {"prompts": "p", "output": "o"}}
PROMPT = np.arange(1, 6, dtype=np.int32)


def test_tasks_in_job_files():
    assert job_from_tables(TABLES).task == TaskParams() and TaskParams().generates
    assert job_from_tables({**TABLES, "task": "score"}).task == TaskParams(kind="score")
    assert job_from_tables({**TABLES, "task": {"kind": "embed", "pooling": "mean"}}).task.pooling == "mean"
    for task in ("rank", {"pooling": "first"}, {"kind": "embed", "continuation": "answer"}, {"normalise": True}):
        with pytest.raises(ConfigError):
            job_from_tables({**TABLES, "task": task})
    with pytest.raises(ConfigError, match="sampling.n = 2"):
        job_from_tables({**TABLES, "task": "score", "sampling": {"n": 2}})
    for sampling in ({"logprobs": -1}, {"prompt_logprobs": 1001}, {"logprobs": "many"}, {"logprobs": True}):
        with pytest.raises(ConfigError, match="logprobs"):
            job_from_tables({**TABLES, "sampling": sampling})


def test_another_task_is_another_run():
    def facts(**tables):
        return sampling_facts(job_from_tables({**TABLES, **tables}), 64)

    kinds = [
        {}, {"task": "score"}, {"task": {"kind": "score", "continuation": "answer"}}, {"task": "embed"},
        {"task": {"kind": "embed", "pooling": "mean"}}, {"task": {"kind": "embed", "normalize": False}},
        {"sampling": {"logprobs": 0}}, {"sampling": {"prompt_logprobs": 0}},
    ]
    found = [facts(**kind) for kind in kinds]
    assert all(found.count(one) == 1 for one in found)
    assert not {"task", "logprobs", "prompt_logprobs"} & found[0].keys(), "runs of earlier versions must stay the same run"


@pytest.mark.parametrize(
    "overrides",
    [{"stop_token_ids": (2**31,), "min_tokens": 1}, {"stop_token_ids": (2**40,)}, {"repetition_penalty": 1e-50}, {"repetition_penalty": 1e50}],
)
def test_what_the_edits_of_logits_cannot_hold_fails_its_row_alone(overrides):
    with pytest.raises(RowError, match="|".join(overrides)):
        sampling_for(PromptRow(0, "x", overrides=overrides), SamplingParams())


def test_what_is_computed_for_each_task():
    own = SamplingParams(max_tokens=9, temperature=1.0, prompt_logprobs=2, stop_token_ids=(1,))
    score = RequestBuilder(None, 10, task=TaskParams(kind="score"))
    request = score.build(row=0, prompt_token_ids=PROMPT, sampling=SamplingParams(max_tokens=9), score_from=3)
    assert request.sampling == SamplingParams(max_tokens=1) and request.first_scored == 3 and request.pooled is None
    assert score.build(row=0, prompt_token_ids=PROMPT, sampling=own, score_from=3).first_scored == 1
    for prompt, score_from in ((PROMPT[:1], 1), (PROMPT, 5)):
        with pytest.raises(RowError, match="nothing to score"):
            score.build(row=0, prompt_token_ids=prompt, sampling=own, score_from=score_from)
    for pooling, place in (("mean", (0, 5)), ("last", (4, 5)), ("cls", (0, 1))):
        embed = RequestBuilder(None, 10, task=TaskParams(kind="embed", pooling=pooling))
        request = embed.build(row=0, prompt_token_ids=PROMPT, sampling=own)
        assert request.pooled == place and request.first_scored is None and request.sampling == SamplingParams(max_tokens=1)
    with pytest.raises(RowError, match="logprobs = 11 is more than the model's vocabulary of 10"):
        RequestBuilder(None, 10).build(row=0, prompt_token_ids=PROMPT, sampling=SamplingParams(logprobs=11))


def test_a_partial_row_without_all_its_log_probabilities_begins_anew():
    builder, sampling = RequestBuilder(None, 10), SamplingParams(logprobs=2, prompt_logprobs=0)
    whole = Generation(
        row=0, status=Status.PARTIAL, token_ids=PROMPT[:2], num_prompt_tokens=5,
        logprobs=TokenLogprobs.empty(2, 2), prompt_logprobs=TokenLogprobs.empty(5, 0),
    )
    request = builder.build(row=0, prompt_token_ids=PROMPT, sampling=sampling, earlier=whole)
    assert len(request.output_token_ids) == 2 == len(request.output_logprobs) and request.first_scored is None
    for lacking in (
        {"logprobs": None}, {"logprobs": TokenLogprobs.empty(1, 2)}, {"logprobs": TokenLogprobs.empty(2, 1)}, {"prompt_logprobs": None},
    ):
        earlier = dataclasses.replace(whole, **lacking)
        request = builder.build(row=0, prompt_token_ids=PROMPT, sampling=sampling, earlier=earlier)
        assert len(request.output_token_ids) == 0 and request.output_logprobs is None and request.first_scored == 1
    plain = builder.build(row=0, prompt_token_ids=PROMPT, sampling=SamplingParams(), earlier=dataclasses.replace(whole, logprobs=None))
    assert len(plain.output_token_ids) == 2


def test_rows_may_ask_for_log_probabilities_of_their_own(tmp_path):
    with PromptsWriter(tmp_path / "p.h5", kind="token_ids") as writer:
        for overrides in ({"logprobs": 2}, None, {"prompt_logprobs": 0}, None):
            writer.append([1, 2], overrides=overrides)
    with h5py.File(tmp_path / "p.h5", "a") as file:
        file["logprobs"][3] = 5000
    job = SamplingParams(logprobs=1)
    with open_prompts(tmp_path / "p.h5") as reader:
        rows = list(reader.rows())
    asked = [(sampling.logprobs, sampling.prompt_logprobs) for sampling in (sampling_for(row, job) for row in rows[:3])]
    assert asked == [(2, None), (1, None), (1, 0)]
    with pytest.raises(RowError, match="logprobs = 5000"):
        sampling_for(rows[3], job)
