"""What of the sampling is part of a run: all that changes answers, and nothing that older runs do not know of."""

from __future__ import annotations

import dataclasses
import json

import pytest

from hpcinfer.config.job import DataSection, JobConfig, ModelSection
from hpcinfer.data.ledger.run_directory import RunIdentity, create_or_open
from hpcinfer.errors import RunDirectoryError
from hpcinfer.request import SamplingParams
from hpcinfer.runner.identity import sampling_facts

OLD = {
    "max_tokens": 32, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "stop_token_ids": [], "ignore_eos": False,
    "max_context": 512,
}
"""As run.json had it before there were penalties and the like."""
CHANGES = (
    {"presence_penalty": 0.5}, {"frequency_penalty": 0.5}, {"repetition_penalty": 1.1}, {"logit_bias": {5: 1.0}}, {"bad_words": "x"},
    {"stop": ["a", "b"]}, {"include_stop_str_in_output": True}, {"min_tokens": 3},
)


def facts(**sampling) -> dict:
    job = JobConfig(
        model=ModelSection(path="m"), data=DataSection(prompts="p", output="o"), sampling=SamplingParams(max_tokens=32, **sampling)
    )
    return sampling_facts(job, 512)


def test_every_field_counts_and_defaults_are_those_of_older_runs():
    assert json.loads(json.dumps(facts())) == OLD
    assert {field.name for field in dataclasses.fields(SamplingParams)} >= {*OLD, "n"} - {"max_context"}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_goes_on_with_the_same_sampling_and_with_no_other(change, tmp_path):
    def identity(sampling: dict) -> RunIdentity:
        return RunIdentity(input_fingerprint="f", num_rows=10, model={}, sampling=sampling)

    create_or_open(tmp_path / "old", identity(OLD))
    create_or_open(tmp_path / "old", identity(facts()))
    with pytest.raises(RunDirectoryError, match=f"sampling.{next(iter(change))}"):
        create_or_open(tmp_path / "old", identity(facts(**change)))
    create_or_open(tmp_path / "new", identity(facts(**change)))
    create_or_open(tmp_path / "new", identity(facts(**change)))
    with pytest.raises(RunDirectoryError, match=f"sampling.{next(iter(change))}"):
        create_or_open(tmp_path / "new", identity(facts()))
