"""The first generations of a run, as they are shown at its end."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from hpcinfer.config.load import load_job
from hpcinfer.data.generations import encode_generations
from hpcinfer.data.prompts.prompts_writer import PromptsWriter
from hpcinfer.errors import TooManyFailedRows
from hpcinfer.request import FinishReason, Generation, Status
from hpcinfer.runner.examples import example_lines
from hpcinfer.runner.replica_loop import check_failures


@pytest.mark.parametrize(("kind", "prompt", "shown"), [("text", "3+4=", "  '3+4=' -> ''"), ("token_ids", [5, 6], "  [5, 6] -> [55]")])
def test_an_empty_text_is_shown_as_one(tmp_path, kind, prompt, shown):
    """A row may end at once at its stop text. Where there is no tokenizer, no row has a text."""
    with PromptsWriter(tmp_path / "prompts.h5", kind=kind) as writer:
        writer.append(prompt)
    ended = Generation(row=0, status=Status.OK, finish_reason=FinishReason.STOP, token_ids=np.array([55], np.int32), num_prompt_tokens=2)
    (tmp_path / "generations.h5").write_bytes(encode_generations([ended], "uuid"))
    job = load_job("jobs/demo.toml", [f"data.prompts={tmp_path / 'prompts.h5'}"])
    assert list(example_lines(job, tmp_path / "generations.h5", 5)) == [shown]


def test_one_failed_row_is_counted_as_one():
    with pytest.raises(TooManyFailedRows, match=r"^1 row failed; run\.max_failed allows 0"):
        check_failures(1, 0, collections.Counter())
