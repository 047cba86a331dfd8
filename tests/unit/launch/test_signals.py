"""The flag that drain signals set."""

from __future__ import annotations

import signal

import pytest

from hpcinfer.launch.signals import ONE_ACT_S, DrainFlag


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def flag(clock):
    flag = DrainFlag(clock)
    flag.install()
    yield flag
    flag.uninstall()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def facts(flag: DrainFlag) -> tuple:
    return bool(flag), flag.reason, flag.is_urgent, flag.is_repeated, flag.signal_number


def test_a_warning(flag):
    assert facts(flag) == (False, "", False, False, 0)
    signal.raise_signal(signal.SIGUSR1)
    assert facts(flag) == (True, "SIGUSR1", False, False, signal.SIGUSR1)


def test_a_signal_that_is_delivered_twice_is_one_request(flag, clock):
    signal.raise_signal(signal.SIGTERM)
    clock.now_s += 0.9 * ONE_ACT_S
    signal.raise_signal(signal.SIGTERM)
    assert facts(flag) == (True, "SIGTERM", True, False, signal.SIGTERM)


def test_a_second_signal(flag, clock):
    signal.raise_signal(signal.SIGUSR1)
    clock.now_s += ONE_ACT_S
    signal.raise_signal(signal.SIGTERM)
    assert facts(flag) == (True, "SIGUSR1", True, True, signal.SIGTERM), "the first reason stays"


def test_a_request_without_a_signal_does_not_make_the_first_signal_a_second_one(flag, clock):
    flag.ask("the end of the job's time")
    clock.now_s += 10
    signal.raise_signal(signal.SIGUSR1)
    assert facts(flag) == (True, "the end of the job's time", False, False, signal.SIGUSR1)
