"""Prompts of too many tokens."""

from __future__ import annotations

import numpy as np
import pytest

from hpcinfer.errors import RowError
from hpcinfer.runner.prompt_limit import PromptLimit

PROMPT = np.arange(1, 21, dtype=np.int32)


@pytest.mark.parametrize(
    ("limit", "max_tokens", "expected"),
    [
        (PromptLimit(30, 0, "left"), 25, list(range(1, 21))),  # it fits, if with little room
        (PromptLimit(21), 5, list(range(1, 21))),
        (PromptLimit(20, 0, "left"), 5, list(range(6, 21))),
        (PromptLimit(20, 0, "right"), 5, list(range(1, 16))),
        (PromptLimit(20, 0, "left"), 19, [20]),
        (PromptLimit(20, 4, "left"), 500, [17, 18, 19, 20]),
        (PromptLimit(100, 8, "left"), 5, list(range(13, 21))),
        (PromptLimit(100, 8, "right"), 5, list(range(1, 9))),
        (PromptLimit(100, 20, "right"), 5, list(range(1, 21))),
    ],
)
def test_what_is_kept(limit, max_tokens, expected):
    kept = limit.fit(PROMPT, max_tokens)
    assert kept.tolist() == expected and kept.dtype == np.int32


@pytest.mark.parametrize(
    ("limit", "words"), [(PromptLimit(20), "leaves room for 19"), (PromptLimit(100, 8), "data.max_prompt_tokens allows 8")]
)
def test_without_a_policy_it_is_an_error_of_the_row(limit, words):
    with pytest.raises(RowError, match=words):
        limit.fit(PROMPT, 5)


@pytest.mark.parametrize("max_tokens", [20, 500])
def test_an_output_that_leaves_no_room_is_an_error_of_the_row(max_tokens):
    with pytest.raises(RowError, match=f"max_tokens = {max_tokens} leaves it no room in a context of 20"):
        PromptLimit(20, 0, "left").fit(PROMPT, max_tokens)


def test_a_continuation_is_never_cut():
    kept, start = PromptLimit(11, 0, "left").fit_continued(PROMPT, 1, 15)
    assert kept.tolist() == list(range(11, 21)) and start == 5
    assert PromptLimit(21).fit_continued(PROMPT, 1, 1)[1] == 1
    for limit, start in ((PromptLimit(11, 0, "left"), 10), (PromptLimit(20, 0, "right"), 5)):
        with pytest.raises(RowError, match="some of the continuation would be lost"):
            limit.fit_continued(PROMPT, 1, start)
