"""Commits in the background: what `add` waits for and what not, the order, what is counted when, and errors."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcinfer.data.generation_table import GenerationTable
from hpcinfer.data.ledger import segment_store
from hpcinfer.data.ledger.commit import commit_bytes
from hpcinfer.data.ledger.coverage import Coverage, list_segments, segment_name
from hpcinfer.data.ledger.run_directory import RunDirectory, create_or_open
from hpcinfer.data.ledger.segments import SegmentPolicy, SegmentWriter
from hpcinfer.errors import ResumableError, RunDirectoryError
from tests.faults.shim.harness import identity, stub_generation
from tests.waiting import until

WRITER = "0123456789abcdef"
NUM_ROWS = 1000


class SlowStorage:
    """Stands in for `commit_bytes`: the bytes reach the disk, but the call returns only when `open` is set."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.begun: list[str] = []
        self.written: list[str] = []
        self.ended: list[str] = []

    def __call__(self, folder: Path, name: str, data: bytes) -> None:
        self.begun.append(name)
        commit_bytes(folder, name, data)
        self.written.append(name)
        assert self.open.wait(20), "nobody opened the storage"
        self.ended.append(name)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return create_or_open(tmp_path / "run", identity(NUM_ROWS))


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowStorage]:
    slow = SlowStorage()
    monkeypatch.setattr(segment_store, "commit_bytes", slow)
    yield slow
    slow.open.set()
    until(lambda: not commit_threads())


def commit_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "commit"]


def rows(start: int, stop: int) -> list:
    return [stub_generation(row) for row in range(start, stop)]


def test_rows_are_taken_while_a_segment_is_written(run: RunDirectory, storage: SlowStorage) -> None:
    callers = []
    coverage = Coverage(run, NUM_ROWS)

    def count(name: str, table: GenerationTable) -> None:
        callers.append((name, threading.current_thread()))
        coverage.add_table(name, table)

    writer = SegmentWriter(run, WRITER, SegmentPolicy(max_rows=2), on_commit=count)
    writer.add(rows(0, 2))
    until(lambda: storage.written)
    for row in range(2, 9):
        writer.add(rows(row, row + 1))  # returns, or this test would not end
    # The first file has its name by now, and its commit has not returned: it counts nowhere.
    assert list_segments(run)[0] == [segment_name(WRITER, 0)]
    assert (writer.num_committed, writer.num_waiting, callers, coverage.num_missing) == (0, 9, [], NUM_ROWS)
    assert len(commit_threads()) == 1 and storage.ended == []
    storage.open.set()
    until(lambda: len(storage.ended) == 4)
    assert writer.num_committed == 0 and callers == [], "counted by another thread than the caller's"
    writer.poll()
    assert writer.num_committed >= 6
    writer.flush()
    assert (writer.num_committed, writer.num_waiting, coverage.num_missing) == (9, 0, NUM_ROWS - 9)
    assert [name for name, _ in callers] == storage.ended == [segment_name(WRITER, number) for number in range(5)]
    assert {thread for _, thread in callers} == {threading.current_thread()}
    assert not commit_threads(), "flush sees the thread gone"


def test_waiting_rows_are_bounded(run: RunDirectory, storage: SlowStorage) -> None:
    writer = SegmentWriter(run, WRITER, SegmentPolicy(max_rows=2, max_queued=3))
    added = []

    def produce() -> None:
        for row in range(0, 40, 2):
            writer.add(rows(row, row + 2))
            added.append(row)

    producer = threading.Thread(target=produce)
    producer.start()
    until(lambda: len(added) == 3)
    time.sleep(0.05)
    assert producer.is_alive() and len(added) == 3, "the fourth segment has to wait"
    assert writer.num_waiting == 8 and len(storage.begun) == 1
    storage.open.set()
    producer.join(20)
    writer.close()
    assert len(added) == 20 and writer.num_committed == 40
    assert 0.05 <= writer.commit_wait_s and 0.05 <= writer.commit_s


def test_a_slow_storage_is_hidden_behind_the_computation(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(folder: Path, name: str, data: bytes) -> None:
        time.sleep(0.05)
        commit_bytes(folder, name, data)

    monkeypatch.setattr(segment_store, "commit_bytes", slow)
    writer = SegmentWriter(run, WRITER, SegmentPolicy(max_rows=1))
    for row in range(4):
        writer.add(rows(row, row + 1))
        before = writer.num_waiting
        until(lambda: writer.poll() or writer.num_waiting < before)  # the computation of a step
    writer.flush()
    assert writer.commit_s >= 0.2 > 20 * writer.commit_wait_s


def test_many_rows_at_once_are_many_segments(run: RunDirectory) -> None:
    writer = SegmentWriter(run, WRITER, SegmentPolicy(max_rows=10, max_queued=1, max_segments=500))
    writer.add(rows(0, 205))
    assert writer.num_waiting - 5 <= 20, "`add` waited for room"
    writer.flush()
    assert list_segments(run)[0] == [segment_name(WRITER, number) for number in range(21)]
    coverage = Coverage(run, NUM_ROWS)
    coverage.refresh()
    assert coverage.num_missing == NUM_ROWS - 205


def fails(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(folder: Path, name: str, data: bytes) -> None:
        raise error

    monkeypatch.setattr(segment_store, "commit_bytes", fail)


ERRORS = [
    (RuntimeError("a mistake of the program"), RuntimeError, "a mistake"),
    (MemoryError("no memory"), MemoryError, "no memory"),
    (SystemExit(7), SystemExit, "7"),
    (OSError(errno.EACCES, os.strerror(errno.EACCES)), RunDirectoryError, "no permission"),
    (RunDirectoryError("another content", fix="x"), RunDirectoryError, "another content"),
]


@pytest.mark.parametrize(("error", "kind", "words"), ERRORS, ids=lambda value: getattr(value, "__name__", None))
@pytest.mark.parametrize("call", ["add", "poll", "flush", "close"])
def test_what_ends_the_thread_is_raised_by_the_next_call(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, error: BaseException, kind: type, words: str, call: str
) -> None:
    writer = SegmentWriter(run, WRITER, SegmentPolicy(max_rows=2))
    with monkeypatch.context() as patch:
        fails(patch, error)
        writer.add(rows(0, 2))
        until(lambda: not commit_threads())
        with pytest.raises(kind, match=words):
            writer.add(rows(2, 3)) if call == "add" else getattr(writer, call)()
    kept = 3 if call == "add" else 2
    assert writer.num_committed == 0
    writer.flush()  # nothing was lost
    assert writer.num_committed in (2, kept) and list_segments(run)[0][0] == segment_name(WRITER, 0)


def test_an_error_while_add_or_flush_waits(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def fail(folder: Path, name: str, data: bytes) -> None:
        assert go_on.wait(20)
        raise RuntimeError("a mistake of the program")

    monkeypatch.setattr(segment_store, "commit_bytes", fail)
    for call in ("add", "flush"):
        go_on.clear()
        writer = SegmentWriter(run, WRITER, SegmentPolicy(max_rows=2, max_queued=1))
        writer.add(rows(0, 2))
        threading.Timer(0.05, go_on.set).start()
        with pytest.raises(RuntimeError, match="a mistake"):
            writer.add(rows(2, 4)) if call == "add" else writer.flush()


def test_add_does_not_wait_for_a_storage_that_refuses(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = SegmentWriter(run, WRITER, SegmentPolicy(max_rows=2, max_queued=2, backoff_s=20))
    began = time.monotonic()
    with monkeypatch.context() as patch:
        fails(patch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        for row in range(0, 40, 2):
            writer.add(rows(row, row + 2))
        until(lambda: writer.is_refused)
        assert writer.num_waiting == 40 and writer.num_retries == 1
    writer.flush()  # tries at once, whatever the back-off says
    assert time.monotonic() - began < 15
    assert writer.num_committed == 40 and not writer.is_refused
    assert list_segments(run)[0] == [segment_name(WRITER, number) for number in range(20)]


def test_stop_commits_what_is_on_its_way_and_waits_for_no_more(run: RunDirectory, storage: SlowStorage) -> None:
    writer = SegmentWriter(run, WRITER, SegmentPolicy(max_rows=2))
    writer.add(rows(0, 4))
    until(lambda: storage.begun)
    began = time.monotonic()
    writer.stop(timeout_s=0.05)
    assert 0.05 <= time.monotonic() - began < 5 and storage.ended == []
    storage.open.set()
    writer.stop()
    assert len(storage.ended) == 2 and not writer.is_refused


def test_stop_raises_nothing(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, OSError(errno.EIO, os.strerror(errno.EIO)))
    writer = SegmentWriter(run, WRITER, SegmentPolicy(max_rows=2, backoff_s=20))
    writer.add(rows(0, 4))
    writer.stop()
    assert writer.num_retries == 1 and writer.num_waiting == 4
    with pytest.raises(ResumableError, match="4 rows cannot be written"):
        writer.poll()


def test_writers_side_by_side(run: RunDirectory) -> None:
    """Two threads build segments at the same moment."""
    writers = [SegmentWriter(run, f"{number:016x}", SegmentPolicy(max_rows=20, max_segments=3)) for number in range(4)]
    for start in range(0, NUM_ROWS, 40):
        for number, writer in enumerate(writers):
            writer.add(rows(start + 10 * number, start + 10 * number + 10))
    for writer in writers:
        writer.close()
    coverage = Coverage(run, NUM_ROWS)
    coverage.refresh()
    assert coverage.is_full and sum(writer.num_committed for writer in writers) == NUM_ROWS


def test_no_thread_without_segments(run: RunDirectory) -> None:
    writer = SegmentWriter(run, WRITER)
    writer.add(rows(0, 5))
    assert not commit_threads()
    writer.close()
    writer.close()
    assert not commit_threads() and writer.num_committed == 5
