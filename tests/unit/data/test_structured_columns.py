"""Structures of single rows: from JSON Lines and prompts files to what a row is sampled with, and their checks."""

from __future__ import annotations

import json

import pytest

from hpcinfer.config.load import job_from_tables
from hpcinfer.data.convert.driver import convert
from hpcinfer.data.prompts.prompt_row import sampling_for
from hpcinfer.data.prompts.reader import open_prompts
from hpcinfer.data.prompts.schema import apply_overrides
from hpcinfer.errors import ConfigError
from hpcinfer.request import Constraint, SamplingParams

SCHEMA = {"type": "object", "properties": {"z": {"type": "integer"}, "a": {"const": "é"}}}


def test_structures_come_through_json_lines_and_prompts_files(tmp_path):
    given = [
        ({"structured_json": SCHEMA}, Constraint("json", json.dumps(SCHEMA, ensure_ascii=False, separators=(",", ":")))),
        ({"structured_json": '{"type": "null"}'}, Constraint("json", '{"type": "null"}')),
        ({"structured_json": True}, Constraint("json", "true")),
        ({"structured_regex": "a|\"b\\d"}, Constraint("regex", "a|\"b\\d")),
        ({"structured_choice": ["x", "é"]}, Constraint("choice", json.dumps(["x", "é"]))),
        ({"structured_grammar": 'start: "a"\n'}, Constraint("grammar", 'start: "a"\n')),
        ({}, Constraint("choice", '["job"]')),
        ({"structured_choice": []}, None), ({"structured_regex": ""}, None), ({"structured_json": ""}, None),
    ]  # fmt: skip
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": "x"} | overrides) + "\n" for overrides, _ in given))
    convert([source], tmp_path / "prompts.h5")
    job = SamplingParams(structured_choice=("job",), temperature=0.5)
    with open_prompts(tmp_path / "prompts.h5") as reader:
        sampling = [sampling_for(row, job) for row in reader.rows()]
    assert [each.constraint for each in sampling] == [constraint for _, constraint in given]
    assert {each.temperature for each in sampling} == {0.5}
    assert [each.is_structured for each in sampling] == [constraint is not None for _, constraint in given]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"structured_json": 5}, "structured_json must be a text"), ({"structured_json": ["a"]}, "structured_json must be a text"),
        ({"structured_regex": ["a"]}, "structured_regex must be a text"), ({"structured_grammar": 1}, "structured_grammar must be a text"),
        ({"structured_choice": [1]}, "structured_choice must be"),
        ({"structured_regex": "a", "structured_choice": ["b"]}, "structured_regex must be the only structure"),
    ],
)  # fmt: skip
def test_what_is_no_structure_is_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        apply_overrides(SamplingParams(), values)


def test_a_job_gives_texts():
    tables = {"model": {"path": "m"}, "data": {"prompts": "p", "output": "o"}}
    job = job_from_tables(tables | {"sampling": {"structured_choice": ["a", "b"]}})
    assert job.sampling.constraint == Constraint("choice", '["a", "b"]')
    with pytest.raises(ConfigError, match=r"sampling\.structured_json"):
        job_from_tables(tables | {"sampling": {"structured_json": {"type": "null"}}})
