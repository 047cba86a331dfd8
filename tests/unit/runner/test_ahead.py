"""Work ahead of whoever takes it: in order, each once, within bounds, errors in their turn, and a clean end."""

from __future__ import annotations

import random
import threading
import time

import pytest

from hpcinfer.runner.ahead import Ahead
from tests.waiting import until


def make(max_items: int = 10, max_bytes: int = 10**9) -> Ahead[int]:
    return Ahead(lambda item: item, max_items=max_items, max_bytes=max_bytes)


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    until(lambda: all(thread.name != "ahead" for thread in threading.enumerate()), within_s=5)


def take_all(ahead: Ahead) -> list[int]:
    found = []
    while (item := ahead.take(wait_s=None)) is not None:
        found.append(item)
    return found


def test_in_order_and_each_once():
    rng, ahead, number, expected = random.Random(5), make(), 1, []
    for _ in range(20):
        batches = []
        for _ in range(rng.randrange(4)):
            size = rng.randrange(1, 6)
            batches.append(list(range(number, number + size)))
            number += size
        expected += [item for batch in batches for item in batch]
        ahead.put(iter(batches))
    assert take_all(ahead) == expected and ahead.take(wait_s=0.0) is None
    ahead.put(iter([[7]]))
    assert take_all(ahead) == [7], "it goes on after a pause"
    ahead.close()


@pytest.mark.parametrize(("max_items", "max_bytes", "expected"), [(10, 10**9, 12), (10**9, 50, 20), (1, 10**9, 4)])
def test_it_stops_where_enough_is_ready(max_items, max_bytes, expected):
    """Batches of 4 items of 3 bytes: no more than one batch beyond the bound."""
    made = []

    def batches():
        for _ in range(100):
            made.append(4)
            yield [3] * 4

    ahead = make(max_items, max_bytes)
    ahead.put(batches())
    until(lambda: sum(made) >= expected, within_s=5)
    time.sleep(0.05)
    assert sum(made) == expected
    for taken in range(1, 9):
        assert ahead.take(wait_s=None) == 3
    until(lambda: sum(made) >= expected + 4, within_s=5)
    assert len(take_all(ahead)) == 400 - taken
    ahead.close()


def test_without_waiting_nothing_is_waited_for():
    gate = threading.Event()

    def batches():
        gate.wait(10)
        yield [1]

    ahead = make()
    ahead.put(batches())
    assert ahead.take(wait_s=0.0) is None
    gate.set()
    assert ahead.take(wait_s=None) == 1
    ahead.close()


def test_an_error_comes_in_its_turn():
    def batches():
        yield [1, 2]
        raise ValueError("the third")

    ahead = make()
    ahead.put(batches())
    ahead.put(iter([[9]]))
    assert [ahead.take(wait_s=None), ahead.take(wait_s=None)] == [1, 2]
    for _ in range(2):
        with pytest.raises(ValueError, match="the third"):
            ahead.take(wait_s=None)
    ahead.close()


@pytest.mark.parametrize("is_full", [True, False])
def test_it_can_be_closed_at_any_moment(is_full):
    begun = threading.Event()

    def batches():
        while True:
            begun.set()
            yield [1] * (5 if is_full else 0)

    ahead = make()
    ahead.put(batches())
    begun.wait(5)
    ahead.close()
    assert ahead.take(wait_s=None) is None
    ahead.put(iter([[1]]))
    assert ahead.take(wait_s=None) is None
    ahead.close()
    make().close()
