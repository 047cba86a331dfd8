"""Structured output of whole runs: rows with structures of their own, equal in every layout, and after a drain in their middle."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcinfer.data.generations import GenerationFile
from hpcinfer.data.prompts.prompts_writer import PromptsWriter
from hpcinfer.request import FinishReason, Generation, Status
from tests.runs import LAYOUTS, assert_same, read_outputs, run_demo
from tests.slow_runs import cut_rows_short
from tests.unit.sampling.test_grammar import PERSON, is_person

RULES: tuple[tuple[dict, Callable[[str], bool]], ...] = (
    ({"structured_json": PERSON}, is_person),
    ({"structured_json": '{"enum":["a",1,null]}'}, lambda text: json.loads(text) in ("a", 1, None)),
    ({"structured_regex": r"[a-f]{3,9}-\d\d"}, lambda text: re.fullmatch(r"[a-f]{3,9}-\d\d", text) is not None),
    ({"structured_choice": ["left", "right"]}, lambda text: text in ("left", "right")),
    ({"structured_grammar": 'start: "x" start | "y"'}, lambda text: re.fullmatch("x*y", text) is not None),
    ({}, lambda text: text in ("yes", "no")),  # the job's own
    ({"structured_choice": []}, lambda text: text not in ("yes", "no")),  # free in spite of the job's
)
BAD = {3: ({"structured_json": {"not": {}}}, "Unimplemented keys"), 17: ({"structured_regex": "(ab"}, "unclosed group")}
NUM_ROWS = 35
LONG = (
    {"structured_regex": "([a-z]{2,5} ){8,12}[0-9]"},
    {"structured_json": {"type": "array", "items": PERSON, "minItems": 2, "maxItems": 2, "x-guidance": {"whitespace_flexible": False}}},
    {"structured_grammar": 'start: "(" start ")" | /[a-c]{20,30}/'},
)
NUM_LONG_ROWS = 18


def rule(row: int) -> tuple[dict, Callable[[str], bool]]:
    return RULES[row % len(RULES)]


def write_job(folder: Path, rows: list[dict]) -> list[str]:
    """Settings of a sampled job whose rows have these overrides."""
    with PromptsWriter(folder / "prompts.h5", kind="text") as writer:
        for row, overrides in enumerate(rows):
            writer.append(f"{row}+{row}=", overrides=overrides)
    return [
        f"data.prompts={folder / 'prompts.h5'}", "sampling.structured_choice=['yes', 'no']", "sampling.temperature=1.0",
        "sampling.seed=3", "sampling.max_tokens=150", "engine.max_sequences=8",
    ]


def generations(output: Path) -> list[Generation]:
    with GenerationFile(output / "generations.h5") as file:
        return list(file)


@pytest.mark.timeout(240)
def test_rows_fulfil_their_own_structures_in_every_layout(tmp_path):
    job = write_job(tmp_path, [BAD[row][0] if row in BAD else rule(row)[0] for row in range(NUM_ROWS)])
    made = {}
    for layout in ("tp1", "tp2", "pp2"):
        run_demo(tmp_path / layout, [*job, *LAYOUTS[layout]])
        made[layout] = [
            (g.key, g.status, g.finish_reason, g.text, g.error, g.token_ids.tolist()) for g in generations(tmp_path / layout)
        ]
    assert made["tp2"] == made["tp1"] and made["pp2"] == made["tp1"]
    rows = generations(tmp_path / "tp1")
    assert len(rows) == NUM_ROWS
    for generation in rows:
        if generation.row in BAD:
            assert generation.status is Status.FAILED and BAD[generation.row][1] in generation.error, generation
            continue
        assert generation.status is Status.OK, generation
        fulfils = rule(generation.row)[1](generation.text)
        assert fulfils or generation.finish_reason is FinishReason.LENGTH, generation
    assert sum(g.finish_reason is FinishReason.STOP for g in rows) > NUM_ROWS - 6


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("first", "then"), [("pp2", "tp2"), pytest.param("tp2", "pp2", marks=pytest.mark.full), pytest.param("sp2", "tp1", marks=pytest.mark.full)]
)
def test_a_row_that_a_drain_cut_short_goes_on_inside_its_structure(first, then, tmp_path):
    job = write_job(tmp_path, [LONG[row % len(LONG)] for row in range(NUM_LONG_ROWS)])
    run_demo(tmp_path / "undisturbed", [*job, *LAYOUTS["tp1"]])
    output = tmp_path / "run"
    cut_rows_short(output, [*job, *LAYOUTS[first]], after=4)
    run_demo(output, [*job, *LAYOUTS[then]])
    assert_same(read_outputs(output), read_outputs(tmp_path / "undisturbed"))


@pytest.mark.timeout(240)
def test_a_structure_of_the_job_that_cannot_be_used_ends_the_start_before_anything_is_made(tmp_path):
    settings = ["sampling.structured_json={\"type\": \"array\", \"uniqueItems\": true}"]
    result = run_demo(tmp_path / "run", settings, expect=2)
    assert "Unimplemented keys" in result.stderr and "uniqueItems" in result.stderr
    assert not (tmp_path / "run").exists()
