"""Rows with every kind of sampling in one run: the same text in every layout, and where a drain cuts rows short in their middle."""

from __future__ import annotations

import pytest

from hpcinfer.data.prompts.prompts_writer import PromptsWriter
from hpcinfer.request import FinishReason
from tests.runs import LAYOUTS, assert_same, read_outputs, run_demo
from tests.slow_runs import cut_rows_short

NUM_ROWS = 48
KINDS = (
    {"stop": ["ae", "bb"]}, {"repetition_penalty": 1.2, "stop": "ee"}, {"presence_penalty": 0.8, "frequency_penalty": -0.2}, {},
    {"bad_words": ["1", "ab"], "min_tokens": 12}, {"logit_bias": {104: 2.0, "105": -100}, "stop": ["ab", "5 "], "min_tokens": 4},
    {"stop": ["é", "aa", "j"], "include_stop_str_in_output": True}, {"min_tokens": 30, "ignore_eos": False},
)
LAYOUTS_HERE = {
    **{name: LAYOUTS[name] for name in ("tp2", "pp2", "sp2", "dp2", "pp2 x sp2, 3 microbatches")},
    "tp1, run ahead": [*LAYOUTS["tp1"], "engine.run_ahead=on"],
    "tp2, run ahead": [*LAYOUTS["tp2"], "engine.run_ahead=on"],
}


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> list[str]:
    path = tmp_path_factory.mktemp("prompts") / "prompts.h5"
    with PromptsWriter(path, kind="text") as writer:
        for row in range(NUM_ROWS):
            writer.append(f"reverse ab{row}:", overrides=KINDS[row % len(KINDS)])
    settings = ["temperature=1.3", "seed=3", "max_tokens=40", "ignore_eos=true"]
    return [f"data.prompts={path}", *(f"sampling.{setting}" for setting in settings)]


@pytest.fixture(scope="module")
def undisturbed(job, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    run_demo(output, [*job, *LAYOUTS["tp1"]])
    outputs = read_outputs(output)
    reasons = [FinishReason(reason) for _, _, reason in outputs.values()]
    assert reasons.count(FinishReason.STOP) > 10 and reasons.count(FinishReason.LENGTH) > 10
    assert all("1" not in text and "ab" not in text for (row, _), (_, text, _) in outputs.items() if row % 8 == 4)
    assert all("ae" not in text and "bb" not in text for (row, _), (_, text, _) in outputs.items() if row % 8 == 0)
    return outputs


@pytest.mark.full
@pytest.mark.timeout(200)
@pytest.mark.parametrize("layout", LAYOUTS_HERE)
def test_the_same_text_in_every_layout(layout, tmp_path, job, undisturbed):
    run_demo(tmp_path / "run", [*job, *LAYOUTS_HERE[layout]])
    assert_same(read_outputs(tmp_path / "run"), undisturbed)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("first", "then"), [("pp2", "tp1, run ahead"), pytest.param("sp2", "tp2", marks=pytest.mark.full), pytest.param("tp2", "pp2", marks=pytest.mark.full)]
)
def test_rows_that_are_cut_short_go_on_to_the_same_text(first, then, tmp_path, job, undisturbed):
    output = tmp_path / "run"
    cut_rows_short(output, [*job, *LAYOUTS_HERE[first]], after=8)
    run_demo(output, [*job, *LAYOUTS_HERE[then]])
    assert_same(read_outputs(output), undisturbed)
