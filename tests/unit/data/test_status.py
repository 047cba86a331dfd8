"""Status from files alone."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from hpcinfer.data.ledger.liveness import Verdict
from hpcinfer.data.ledger.run_directory import create_or_open
from hpcinfer.data.ledger.segments import SegmentPolicy
from hpcinfer.data.ledger.status import read_status
from hpcinfer.data.ledger.writers import WriterIdentity, register_writer
from hpcinfer.errors import RunDirectoryError
from tests.faults.shim.harness import Replica, identity, stub_generation


def test_new_half_done_and_complete(tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = create_or_open(path, identity(100))
    empty = read_status(path)
    assert (empty.num_total, empty.num_left, empty.complete, empty.writers) == (100, 100, False, ())
    replica = Replica(path, 100, policy=SegmentPolicy(max_rows=10))
    replica.segments.add([stub_generation(row) for row in range(40)] + [stub_generation(50, partial=True)])
    replica.segments.flush()
    replica.writer.set_state(
        "running",
        rows_ok=replica.segments.num_ok,
        rows_failed=replica.segments.num_failed,
        rows_claimed=60,
        rows_per_s=2.0,
    )
    half = read_status(run)
    assert (half.num_done, half.num_failed, half.num_partial, half.num_claimed, half.num_left) == (34, 6, 1, 20, 40)
    assert half.exact and half.eta_s == 30 and half.writers[0].verdict is Verdict.LIVE
    quick = read_status(run, exact=False)
    assert (quick.num_done, quick.num_failed, quick.exact) == (34, 6, False)
    assert replica.live()
    done = read_status(run)
    assert done.complete and done.num_done + done.num_failed == 100
    assert done.num_left == 0 and done.output == run.generations
    assert done.writers[0].verdict is Verdict.LEFT and done.eta_s == 0


def test_dead_and_silent_writers(tmp_path: Path) -> None:
    run = create_or_open(tmp_path / "run", identity(10))
    here = WriterIdentity.of_this_process()
    register_writer(run, WriterIdentity(boot_id=here.boot_id, pid_namespace=here.pid_namespace, pid=2**22 + 1))
    register_writer(run, WriterIdentity(job="17"), wall_clock=lambda: time.time() - 1000)
    verdicts = {writer.identity.job: writer.verdict for writer in read_status(run).writers}
    assert verdicts == {"": Verdict.DEAD, "17": Verdict.SILENT}


def test_not_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError):
        read_status(tmp_path)


def test_many_segments_are_quick(tmp_path: Path) -> None:
    run = create_or_open(tmp_path / "run", identity(10_000))
    for index in range(10_000):
        (run.segments / f"seg-{index % 50:016x}-{index:06d}.h5").touch()
    register_writer(run, WriterIdentity())
    began = time.perf_counter()
    status = read_status(run)
    assert status.num_segments == 10_000 and not status.exact
    assert time.perf_counter() - began < 2
