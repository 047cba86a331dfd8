"""The rule of who holds the others up."""

from __future__ import annotations

import dataclasses

import pytest

from hpcinfer.data.ledger.stragglers import find_stragglers


@dataclasses.dataclass(kw_only=True)
class Writer:
    id: str
    state: str = "running"
    beat_age_s: float = 1.0
    beat_interval_s: float = 5.0
    running_s: float = 1000.0
    output_tokens_per_s: float = 100.0


def found(*changes: dict) -> set[str]:
    return set(find_stragglers(Writer(id=str(number), **change) for number, change in enumerate(changes)))


@pytest.mark.parametrize(
    ("changes", "stragglers"),
    [
        ([{}, {}, {}], set()),
        ([{}, {}, {"output_tokens_per_s": 49.0}], {"2"}),
        ([{}, {}, {"output_tokens_per_s": 51.0}], set()),
        ([{}, {"output_tokens_per_s": 20.0}], {"1"}),
        ([{"output_tokens_per_s": 1.0}], set()),  # nobody to compare with
        ([{}, {}, {"output_tokens_per_s": 1.0, "running_s": 20.0}], set()),  # it has just begun
        ([{}, {}, {"output_tokens_per_s": 0.0, "state": "idle"}], set()),
        ([{}, {}, {"output_tokens_per_s": 0.0, "state": "draining"}], set()),
        ([{"output_tokens_per_s": 0.0}, {"output_tokens_per_s": 0.0}], set()),
        ([{"beat_age_s": 31.0}], {"0"}),
        ([{"beat_age_s": 29.0}], set()),
        ([{"beat_age_s": 100.0, "beat_interval_s": 20.0}], set()),  # it does not mean to beat more often
        ([{"beat_age_s": 100.0, "state": "loading"}], set()),  # there are no steps to count
        ([{"beat_age_s": float("inf"), "state": ""}], set()),
    ],
)
def test_the_rule(changes, stragglers):
    assert found(*changes) == stragglers


def test_the_reason_has_both_figures():
    reasons = find_stragglers([Writer(id="a"), Writer(id="b", output_tokens_per_s=0.25), Writer(id="c")])
    assert reasons == {"b": "0.25 tokens/s, the median of 3 is 100"}
    assert find_stragglers([Writer(id="a", beat_age_s=90.0)]) == {"a": "no heartbeat for 1:30"}
