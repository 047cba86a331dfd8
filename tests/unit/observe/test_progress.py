"""The progress line, on a terminal and in a log file."""

from __future__ import annotations

import io

from hpcinfer.observe.metrics import PhaseClock, RateMeter
from hpcinfer.observe.progress import ProgressBar, ProgressPoint, progress_line
from hpcinfer.units import format_rate


def point(done, total=100, tokens=0, failed=0):
    return ProgressPoint(rows_done=done, rows_total=total, tokens=tokens, rows_failed=failed)


def test_a_line_has_rows_rates_and_eta():
    line = progress_line(point(25, failed=2), rows_per_s=5.0, tokens_per_s=1234.0)
    for words in ("25.0 %", "25/100 rows", "2 failed", "5 rows/s", "1,234 tokens/s", "ETA 0:15"):
        assert words in line
    assert "ETA -" in progress_line(point(0), 0.0, 0.0)
    assert "100.0 %" in progress_line(point(0, total=0), 0.0, 0.0)


def test_a_log_file_gets_a_line_every_ten_seconds_and_the_last():
    stream, now = io.StringIO(), [0.0]
    bar = ProgressBar(stream, clock=lambda: now[0])
    for second in range(25):
        now[0] = float(second)
        bar.update(point(second))
    bar.update(point(100), force=True)
    bar.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4 and "100/100" in lines[-1] and "\r" not in stream.getvalue()


def test_a_terminal_is_redrawn_in_place():
    stream = io.StringIO()
    stream.isatty = lambda: True
    bar = ProgressBar(stream, clock=iter([0.0, 0.1, 0.5]).__next__)
    for done in (1, 2, 3):
        bar.update(point(done))
    bar.close()
    assert stream.getvalue().count("\r") == 2 and stream.getvalue().endswith("\n")


def test_rates_are_of_the_last_seconds():
    meter = RateMeter(window_s=10)
    assert meter.update(0, 0) == 0
    assert meter.update(5, 50) == 10
    for second in range(6, 40):
        rate = meter.update(second, 50 + 2 * (second - 5))
    assert abs(rate - 2) < 0.01


def test_phases_add_up():
    clock = PhaseClock()
    with clock.phase("load"):
        pass
    clock.add("io", 2.0)
    clock.add("io", 1.0)
    assert clock.seconds["io"] == 3.0 and clock.seconds["load"] >= 0


def test_points_of_a_rate_may_be_spaced():
    meter = RateMeter(window_s=10, spacing_s=1.0)
    for tick in range(2000):
        rate = meter.update(tick / 100, tick)
    assert abs(rate - 100) < 1e-6 and len(meter._points) <= 12


def test_rates_below_one_say_something():
    assert [format_rate(rate) for rate in (0.0, 0.0123, 0.5, 3.25, 1234.5)] == ["0", "0.012", "0.5", "3.2", "1,234"]
