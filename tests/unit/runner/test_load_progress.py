"""Lines about loading: one every few seconds, and what it came to."""

from __future__ import annotations

import logging

from hpcinfer.models.weights import LoadFigures
from hpcinfer.runner.progress import LoadProgress


def test_lines_every_few_seconds(caplog):
    progress = LoadProgress(logging.getLogger("loading"))
    with caplog.at_level(logging.INFO, "loading"):
        for second in range(1, 13):
            progress.update(
                LoadFigures(total_bytes=30_000_000_000, done_bytes=second * 2_400_000_000, read_bytes=0, seconds=second)
            )
    assert caplog.messages == [
        "weights 12.0 GB of 30.0 GB, 2.4 GB/s", "weights 24.0 GB of 30.0 GB, 2.4 GB/s",
    ]
    assert progress.total() == "weights of 28.8 GB, 2.4 GB/s"


def test_other_ranks_are_silent_and_keep_their_figures(caplog):
    progress = LoadProgress(None)
    with caplog.at_level(logging.INFO):
        progress.update(LoadFigures(total_bytes=2, done_bytes=1, read_bytes=1, seconds=100.0))
    assert not caplog.messages and progress.figures.read_bytes == 1


def test_nothing_loaded():
    assert LoadProgress(None).total() == "weights of 0.000 GB, 0.000 GB/s"
