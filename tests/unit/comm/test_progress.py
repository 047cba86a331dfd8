"""The progress engine on requests that the test completes by hand. Without MPI."""

import threading
import time

import pytest

from hpcinfer.comm.communicator import Counters
from hpcinfer.comm.operation import MpiOperation, OperationQueue
from hpcinfer.comm.progress import PARK_AFTER, POLL_S, ProgressEngine
from hpcinfer.errors import CommunicationError


class FakeRequest:
    """Complete when the test says so."""

    def __init__(self):
        self.complete = False
        self.tests = 0

    def Test(self, status=None):
        self.tests += 1
        return self.complete


@pytest.fixture
def engine():
    engine = ProgressEngine(rank=3, host="node7")
    yield engine
    engine.close()


def queue(strict=False):
    return OperationQueue("tp", 1, 2, Counters(), strict=strict)


def operation(queue, verb="all_reduce", log=None, **settings):
    request = FakeRequest()

    def start():
        if log is not None:
            log.append(verb)
        return [request]

    made = MpiOperation(queue, verb, 16, start, **settings)
    made.request = request
    return made


# MpiOperation has slots; tests want to reach its request.
class MpiOperation(MpiOperation):
    request: FakeRequest


def wait_until(condition):
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_an_operation_starts_at_issue_and_ends_in_the_background(engine):
    lane, buffer = queue(), object()
    first = operation(lane, buffers=buffer)
    engine.submit(lane, [first])
    assert first.requests == [first.request] and not first.finished and first.buffers is buffer
    first.request.complete = True
    wait_until(lambda: first.finished)
    assert first.buffers is None, "buffers are held exactly until the end"
    assert 0 < first.issued_s <= first.started_s <= first.ended_s
    assert lane.in_flight == 0 and lane.counters.operations == 1 and lane.counters.bytes == 16
    assert lane.counters.wait_s == 0
    engine.wait(first, 1)


def test_strict_starts_one_batch_at_a_time(engine):
    lane, log = queue(strict=True), []
    first, second, third, fourth = (operation(lane, name, log) for name in "abcd")
    engine.submit(lane, [first])
    engine.submit(lane, [second, third])
    engine.submit(lane, [fourth])
    assert log == ["a"]
    first.request.complete = True
    wait_until(lambda: log == ["a", "b", "c"])
    third.request.complete = True
    wait_until(lambda: third.finished)
    assert log == ["a", "b", "c"], "the batch is over when all of it is"
    second.request.complete = fourth.request.complete = True
    engine.wait(fourth, 5)
    assert log == ["a", "b", "c", "d"]


def test_queues_do_not_wait_for_each_other(engine):
    one, other = queue(strict=True), queue(strict=True)
    stuck, free = operation(one), operation(other)
    engine.submit(one, [stuck])
    engine.submit(other, [free])
    free.request.complete = True
    engine.wait(free, 5)
    assert not stuck.finished


def test_a_waiting_caller_moves_other_queues_too(engine):
    one, other, log = queue(), queue(strict=True), []
    first, second = operation(other, "a", log), operation(other, "b", log)
    engine.submit(other, [first])
    engine.submit(other, [second])
    awaited = operation(one)
    engine.submit(one, [awaited])
    first.request.complete = True
    with pytest.raises(CommunicationError):
        engine.wait(awaited, 0.05)
    assert log == ["a", "b"]


def test_deadline(engine):
    lane = queue(strict=True)
    ahead, behind = operation(lane, "send", peer=0, label="hidden"), operation(lane, "recv", peer=0)
    engine.submit(lane, [ahead])
    engine.submit(lane, [behind])
    began = time.monotonic()
    with pytest.raises(CommunicationError) as caught:
        engine.wait(behind, 0.1)
    assert 0.1 <= time.monotonic() - began < 5
    text = str(caught.value)
    for part in (
        "recv on communicator 'tp'", "deadline of 0.1 s", "rank 1 of 2", "world rank 3", "host node7", "16 bytes",
        "peer 0", "not started: send (hidden)", "raise the communication deadline",
    ):
        assert part in text
    assert lane.counters.wait_s >= 0.1
    with pytest.raises(CommunicationError, match="deadline"):
        engine.submit(lane, [operation(lane)])


def test_a_failing_start_and_a_failing_test(engine):
    def broken():
        raise RuntimeError("MPI_ERR_TRUNCATE")

    lane = queue()
    failing = MpiOperation(lane, "recv", 4, broken)
    engine.submit(lane, [failing])
    with pytest.raises(CommunicationError, match="MPI_ERR_TRUNCATE") as caught:
        engine.wait(failing, 1)
    assert isinstance(caught.value.__cause__, RuntimeError)
    other = queue()
    failing = operation(other)
    failing.request.Test = lambda status: broken()
    engine.submit(other, [failing])
    with pytest.raises(CommunicationError, match="same order"):
        engine.wait(failing, 1)
    assert other.failure is not None and other.in_flight == 0


def test_abandon(engine):
    lane = queue(strict=True)
    started, queued = operation(lane, buffers="kept"), operation(lane)
    engine.submit(lane, [started])
    engine.submit(lane, [queued])
    engine.abandon(lane, CommunicationError("aborted"))
    for given_up in (started, queued):
        with pytest.raises(CommunicationError, match="aborted"):
            engine.wait(given_up, 1)
    assert started.buffers == "kept", "MPI may still write to it"


def test_finish_waits_for_what_has_no_handle(engine):
    lane = queue(strict=True)
    operations = [operation(lane) for _ in range(3)]
    for each in operations:
        each.request.complete = True
        engine.submit(lane, [each])
    engine.finish(lane, 5)
    assert lane.in_flight == 0 and all(each.finished for each in operations)


def test_the_thread_parks_without_work_and_wakes_for_it(engine):
    wait_until(lambda: engine._parked)
    time.sleep(PARK_AFTER * POLL_S)
    lane = queue()
    late = operation(lane)
    late.request.complete = True
    engine.submit(lane, [late])
    wait_until(lambda: late.finished)


def test_threads_may_wait_at_the_same_time(engine):
    lane = queue()
    operations = [operation(lane) for _ in range(8)]
    threads = [threading.Thread(target=engine.wait, args=(each, 10)) for each in operations]
    for each in operations:
        engine.submit(lane, [each])
    for thread in threads:
        thread.start()
    for each in operations:
        each.request.complete = True
    for thread in threads:
        thread.join(10)
    assert all(each.finished for each in operations) and lane.in_flight == 0


def test_close_ends_the_thread_and_takes_nothing_more():
    engine = ProgressEngine()
    engine.close()
    assert not engine._thread.is_alive()
    engine.close()
    lane = queue()
    with pytest.raises(CommunicationError, match="closed"):
        engine.submit(lane, [operation(lane)])
