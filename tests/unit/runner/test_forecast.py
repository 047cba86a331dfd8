"""The warning that a run will not be over before its job is."""

from __future__ import annotations

from hpcinfer.runner.forecast import Forecast


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def say(rate, *, left_s: float, total: int, until_s: float, before: int = 0, step_s: float = 2.0) -> list[tuple[float, str]]:
    """(time, warning) of a run that ends `rate(now)` rows a second from 10 s on."""
    clock, said, done = Clock(), [], float(before)
    forecast = Forecast(left_s=left_s, clock=clock)
    while clock.now_s < until_s:
        if text := forecast.update(int(done), total):
            said.append((clock.now_s, text))
        clock.now_s += step_s
        done = min(total, done + (rate(clock.now_s) * step_s if clock.now_s > 10 else 0))
    return said


def test_a_run_that_will_not_end_in_time_says_so_once_and_early():
    said = say(lambda now: 10.0, left_s=3600, total=100_000, until_s=3590, before=500)
    assert len(said) == 1, said
    now, text = said[0]
    assert 60 <= now <= 80
    for words in ("98,", "10 rows/s", "2:44:", "58:", "about 6", "more nodes", "array", "exit code 3"):
        assert words in text, text


def test_a_short_job_says_so_sooner():
    said = say(lambda now: 10.0, left_s=100, total=100_000, until_s=90, step_s=1.0)
    assert 15 <= said[0][0] <= 20


def test_a_run_that_fits_says_nothing():
    assert not say(lambda now: 10.0, left_s=3600, total=33_000, until_s=3500)
    assert not say(lambda now: 10.0, left_s=3600, total=37_000, until_s=200), "within what rates vary"


def test_too_few_rows_say_nothing():
    assert not say(lambda now: 0.01, left_s=3600, total=100_000, until_s=1500)


def test_it_is_said_again_when_it_changes_much():
    said = say(lambda now: 10.0 if now < 1000 else 22.0, left_s=3600, total=100_000, until_s=3500)
    assert len(said) == 2 and 1000 < said[1][0] < 1800, said


def test_a_resumed_run_counts_its_own_rows():
    """What earlier lives did is no rate of this one."""
    assert not say(lambda now: 0.0, left_s=3600, total=100_000, until_s=1500, before=5000)
