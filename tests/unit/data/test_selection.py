"""Rows of a trial: which they are, and that nothing else is offered, computed or counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.data.ledger.claims import NoClaim
from hpcinfer.data.ledger.coverage import Coverage
from hpcinfer.data.ledger.merge import merge_run, merge_trial
from hpcinfer.data.ledger.run_directory import create_or_open
from hpcinfer.data.ledger.selection import RowSelection, select_rows
from hpcinfer.data.generations import GenerationFile
from hpcinfer.errors import ConfigError
from tests.faults.shim.harness import check_output, identity
from tests.unit.data.lives import Clock, Life


def rows_of(selection: RowSelection) -> list[int]:
    return list(range(selection.start, selection.stop)) if selection.drawn is None else selection.drawn.tolist()


@pytest.mark.parametrize(
    ("rows", "limit", "expected"),
    [("", 0, None), ("0:50", 0, None), (":", 50, None), ("", 1000, None), ("5:9", 0, [5, 6, 7, 8]), ("47:", 0, [47, 48, 49]),
     (":2", 9, [0, 1]), ("48:90", 0, [48, 49])],
)  # fmt: skip
def test_which_rows_are_meant(rows, limit, expected):
    selection = select_rows(rows, limit, 50)
    assert (selection if selection is None else rows_of(selection)) == expected


@pytest.mark.parametrize("rows", ["50:", "9:9", "9:5"])
def test_no_row_is_an_error(rows):
    with pytest.raises(ConfigError, match="no row"):
        select_rows(rows, 0, 50)


def test_drawn_rows_are_spread_and_the_same_each_time():
    few, many = (set(rows_of(select_rows("", limit, 100_000))) for limit in (100, 1000))
    assert len(few) == 100 and few < many
    # 1000 rows in 10 tenths: 100 each, give or take.
    tenths = np.bincount(np.array(sorted(many)) // 10_000, minlength=10)
    assert tenths.min() > 60 and tenths.max() < 140
    inside = rows_of(select_rows("500:700", 20, 100_000))
    assert len(inside) == 20 and 500 <= min(inside) and max(inside) < 700


@given(st.integers(1, 70), st.integers(1, 5), st.integers(1, 12), st.data())
def test_the_bitmap_and_the_claims_are_those_rows(num_rows, num_samples, claim_size, data):
    start = data.draw(st.integers(0, num_rows - 1))
    stop = data.draw(st.integers(start + 1, num_rows))
    drawn = data.draw(st.one_of(st.none(), st.sets(st.integers(start, stop - 1), min_size=1)))
    selection = RowSelection(start, stop, None if drawn is None else np.array(sorted(drawn), np.int64))
    wanted = set(rows_of(selection))
    bits = np.unpackbits(selection.unselected_bits(num_rows, num_samples), bitorder="little")[: num_rows * num_samples]
    assert [key // num_samples for key in np.flatnonzero(bits == 0)] == [row for row in sorted(wanted) for _ in range(num_samples)]
    num_claims = -(-num_rows // claim_size)
    counts = selection.rows_of_claims(num_claims, claim_size)
    assert counts.tolist() == [sum(row // claim_size == claim for row in wanted) for claim in range(num_claims)]


@pytest.mark.parametrize(("rows", "limit"), [("", 40), ("100:140", 0)])
def test_a_trial_does_its_rows_and_the_whole_run_the_others(tmp_path: Path, rows, limit):
    run, clock = create_or_open(tmp_path / "run", identity(640, 2)), Clock()
    selection = select_rows(rows, limit, 640)
    trial = Life(run, clock, num_rows=640, selection=selection)
    taken = trial.take_all()
    assert sorted({row for claim in taken for row, _, _ in trial.ledger.remaining(claim)}) == rows_of(selection)
    assert trial.do(taken) == trial.ledger.coverage.num_wanted == 80
    assert trial.ledger.next_claim() is NoClaim.DONE and not run.is_complete(640)
    trial.writer.leave()
    for _ in range(2):  # a later one takes its place
        merge_trial(run, 640)
    with GenerationFile(run.trial) as file:
        assert not file.complete and sorted({g.row for g in file}) == rows_of(selection)
    again = Life(run, clock, num_rows=640, selection=selection)
    assert again.ledger.next_claim() is NoClaim.DONE
    whole = Life(run, clock, num_rows=640)
    assert whole.do(whole.take_all()) == 1280 - 80
    assert merge_run(run, 640).complete
    check_output(run, 640)


def test_rows_of_others_do_not_finish_a_trial(tmp_path: Path):
    run = create_or_open(tmp_path / "run", identity(100))
    coverage = Coverage(run, 100, selection=RowSelection(10, 12))
    rows = np.array([1, 10, 60])
    coverage.add("seg-" + "a" * 16 + "-000000.h5", rows, np.zeros(3, np.int64), np.zeros(3, np.uint8), np.ones(3))
    assert coverage.num_missing == 1 and not coverage.is_full and coverage.is_done(10, 0) and not coverage.is_done(11, 0)
