"""When rows are no longer begun, and when those in work are cut short."""

from __future__ import annotations

import signal

import pytest

from hpcinfer.launch.signals import DrainFlag
from hpcinfer.runner.drain import UNKNOWN_S, DrainPlan, Phase


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def make(clock, *, drain_s=None, margin_s=30.0, left_s=None) -> tuple[DrainPlan, DrainFlag]:
    flag = DrainFlag(clock)
    return DrainPlan(flag, drain_s=drain_s, margin_s=margin_s, left_s=left_s, clock=clock), flag


def times(plan: DrainPlan, clock: Clock, until_s: float) -> tuple[float | None, float | None]:
    """Seconds from now to the begin of the drain and to its end."""
    began = clock.now_s
    seen = {}
    while clock.now_s < began + until_s:
        seen.setdefault(plan.phase(), round(clock.now_s - began, 3))
        clock.now_s += 0.25
    assert list(seen) == sorted(seen, key=[Phase.RUN, Phase.DRAIN, Phase.CUT].index), "phases only go on"
    return seen.get(Phase.DRAIN), seen.get(Phase.CUT)


def test_without_a_signal_and_an_end_nothing_happens(clock):
    plan, _ = make(clock)
    assert times(plan, clock, 10_000) == (None, None)


@pytest.mark.parametrize(
    ("drain_s", "left_s", "urgent", "allowed_s"),
    [
        (None, None, False, UNKNOWN_S),
        (None, None, True, UNKNOWN_S),
        (None, 1000.0, False, 970.0),  # the job's time without the margin
        (None, 1000.0, True, UNKNOWN_S),  # whoever sends SIGTERM will not wait that long
        (20.0, None, False, 20.0),
        (20.0, None, True, 20.0),
        (20.0, 1000.0, False, 20.0),
        (5000.0, 1000.0, False, 970.0),
        (0.0, 1000.0, False, 0.0),
    ],
)
def test_what_a_signal_leaves(clock, drain_s, left_s, urgent, allowed_s):
    plan, flag = make(clock, drain_s=drain_s, left_s=left_s)
    assert plan.phase() is Phase.RUN
    flag.ask("SIGUSR1", urgent=urgent)
    drains, cuts = times(plan, clock, 2000)
    assert cuts == allowed_s and (drains == 0 if allowed_s else drains is None)
    assert plan.reason == "SIGUSR1"


@pytest.mark.parametrize(
    ("settings", "drains", "cuts"),
    [
        ({"left_s": 1000.0}, 940.0, 970.0),
        ({"left_s": 1000.0, "drain_s": 100.0}, 870.0, 970.0),
        ({"left_s": 1000.0, "drain_s": 500.0}, 845.0, 970.0),  # an eighth of the job's time
        ({"left_s": 1000.0, "drain_s": 0.0}, None, 970.0),
        ({"left_s": 80.0}, 60.0, 70.0),
        ({"left_s": 1000.0, "margin_s": 0.0}, None, 1000.0),
        ({"left_s": -5.0}, None, 0.0),
    ],
)
def test_the_end_of_the_job_drains_without_a_signal(clock, settings, drains, cuts):
    plan, flag = make(clock, **settings)
    assert times(plan, clock, 2000) == (drains, cuts)
    assert flag.reason == "the end of the job's time"


def test_a_second_signal_ends_the_waiting(clock):
    plan, flag = make(clock, left_s=1000.0)
    flag.ask("SIGUSR1")
    assert plan.phase() is Phase.DRAIN and plan.left_s == 970
    clock.now_s += 50
    assert plan.phase() is Phase.DRAIN and plan.left_s == 920
    flag.ask("SIGUSR1", repeated=True)
    assert plan.phase() is Phase.CUT and plan.left_s == 0


def test_sigterm_after_the_warning_shortens_it_and_a_warning_after_sigterm_does_not_prolong_it(clock):
    plan, flag = make(clock, left_s=1000.0)
    flag.ask("SIGUSR1 to rank 1")
    assert plan.phase() is Phase.DRAIN
    clock.now_s += 10
    flag.ask("SIGTERM to rank 2", urgent=True)
    assert plan.phase() is Phase.DRAIN and plan.left_s == UNKNOWN_S
    clock.now_s += 2
    flag.ask("SIGUSR1 to rank 3")
    assert plan.phase() is Phase.DRAIN and plan.left_s == UNKNOWN_S - 2


def test_a_real_signal_counts(clock):
    plan, flag = make(clock)
    flag.install()
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        flag.uninstall()
    assert plan.phase() is Phase.DRAIN and plan.reason == "SIGTERM"


def test_an_interrupt_that_got_lost_is_raised_again(clock):
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a shell ignore it
    plan, flag = make(clock)
    flag.install()
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            plan.phase()
        flag.uninstall()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        flag.uninstall()
        signal.signal(signal.SIGINT, previous)


def test_an_ignored_interrupt_stays_ignored(clock):
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
    plan, flag = make(clock)
    flag.install()
    try:
        signal.raise_signal(signal.SIGINT)
        assert plan.phase() is Phase.RUN
    finally:
        flag.uninstall()
        signal.signal(signal.SIGINT, previous)
