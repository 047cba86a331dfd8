"""What a trial says about the whole run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hpcinfer.runner.trial import RowStatistics, estimate, trial_lines


def statistics(lengths, *, seconds=10.0, full_rows=0, full_s=0.0) -> RowStatistics:
    made = RowStatistics(seconds=seconds, full_rows=full_rows, full_s=full_s)
    for length in lengths:
        made.add(5, length)
    return made


def estimated(*replicas, **changes):
    ended = sum(replica.ok for replica in replicas)
    settings = {
        "num_rows": 10_000, "num_trial": 100, "ended": ended, "output_tokens": sum(r.output_tokens for r in replicas), "start_up_s": 60.0,
        "max_sequences": 16, "num_ranks": 8, "device": "cuda", "is_drawn": True, **changes,
    }  # fmt: skip
    return estimate(replicas, **settings)


def test_the_time_of_all_rows_follows_from_the_rate():
    found = estimated(statistics([10] * 100))
    assert found["rows_per_s"] == 10 and found["output_tokens_per_s"] == 100
    assert found["seconds"] == found["seconds_low"] == found["seconds_high"] == 1000, "equal rows leave nothing uncertain"
    assert found["rank_hours"] == pytest.approx(8 * 1000 / 3600)
    assert json.loads(json.dumps(found)) == found


def test_a_batch_that_was_full_decides():
    replicas = [statistics([10] * 50, full_rows=40, full_s=2.0), statistics([10] * 50, full_rows=30, full_s=3.0)]
    found = estimated(*replicas)
    assert found["is_full"] and found["rows_per_s"] == pytest.approx(20 + 10) and found["output_tokens_per_s"] == pytest.approx(300)
    short = estimated(statistics([10] * 50, full_rows=40, full_s=2.0), statistics([10] * 50, full_rows=15, full_s=1.0))
    assert not short["is_full"] and short["rows_per_s"] == 10
    assert "larger --limit" in "\n".join(trial_lines(short)) and "larger --limit" not in "\n".join(trial_lines(found))


def test_the_range_holds_the_truth_about_nineteen_times_in_twenty():
    """Rows drawn from lengths of which the mean is known; time goes by tokens."""
    rng = np.random.default_rng(3)
    lengths = rng.geometric(1 / 200, 10_000)
    hits = 0
    for _ in range(200):
        drawn = rng.choice(lengths, 100, replace=False)
        found = estimated(statistics(drawn.tolist(), seconds=float(drawn.sum()) / 1000))
        hits += found["seconds_low"] <= lengths.sum() / 1000 <= found["seconds_high"]
    assert 180 <= hits <= 199


def test_a_trial_of_everything_is_certain():
    found = estimated(statistics([1, 100] * 50), num_rows=100)
    assert found["seconds"] == found["seconds_low"] == found["seconds_high"] == pytest.approx(10)


def test_what_is_said():
    text = "\n".join(trial_lines(estimated(statistics([10, 30] * 50))))
    for words in ("100 of 10,000 rows", "16:40 (15:00 to 18:20)", "2.2 GPU-hours on 8 ranks", "1:00 at each start"):
        assert words in text
    assert "drawn" not in text
    assert "not drawn" in "\n".join(trial_lines(estimated(statistics([10] * 100), is_drawn=False, device="cpu")))
    assert "done before" in trial_lines(estimated(ended=0))[0]


def test_failed_rows_count_for_the_rate():
    found = estimated(RowStatistics(seconds=5.0), ended=100, output_tokens=0)
    assert found["seconds"] == 500 and found["output_tokens"] == 0 and trial_lines(found)
