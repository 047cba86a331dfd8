"""Real file systems that are full, read-only or of few file handles."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.shim.harness import NUM_ROWS, Replica, check_output, identity, stub_generation
from hpcinfer.data.ledger.commit import TEMPORARY_PREFIX
from hpcinfer.data.ledger.coverage import Coverage
from hpcinfer.data.ledger.merge import merge_run
from hpcinfer.data.ledger.run_directory import create_or_open
from hpcinfer.data.ledger.segments import SegmentPolicy, SegmentWriter
from hpcinfer.errors import ResumableError, RunDirectoryError
from tests.waiting import until

ROOT = Path(__file__).resolve().parent.parent.parent


def _mount(folder: Path, *arguments: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mount {' '.join(arguments)}: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    _mount(folder, "-t", "tmpfs", "-o", "size=4m", "none")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _rows(count: int) -> list:
    return [stub_generation(row) for row in range(count)]


def test_full_disk_keeps_rows_and_ends_resumable(small_disk: Path) -> None:
    run = create_or_open(small_disk / "run", identity(NUM_ROWS))
    policy = SegmentPolicy(max_rows=8, retry_s=0.6, backoff_s=0.05)
    writer = SegmentWriter(run, "00" * 8, policy)
    writer.add(_rows(8))
    writer.flush()
    assert writer.num_committed == 8
    ballast = small_disk / "ballast"
    _fill(ballast)
    writer.add(_rows(NUM_ROWS)[8:20])
    until(lambda: writer.is_refused)
    assert writer.num_waiting == 12 and writer.num_committed == 8
    with pytest.raises(ResumableError, match="No space left") as caught:
        writer.flush()
    assert "12 rows" in str(caught.value) and caught.value.exit_code == 3
    assert writer.num_retries > 2
    assert not [name for name in os.listdir(run.segments) if name.startswith(TEMPORARY_PREFIX)]
    ballast.unlink()
    second = Replica(run.path, NUM_ROWS, policy=policy)
    assert second.live()
    assert second.segments.num_committed == NUM_ROWS - 8
    check_output(run, NUM_ROWS)


def test_space_freed_in_time(small_disk: Path) -> None:
    run = create_or_open(small_disk / "run", identity(NUM_ROWS))
    writer = SegmentWriter(run, "00" * 8, SegmentPolicy(max_rows=8, retry_s=60, backoff_s=0.05))
    ballast = small_disk / "ballast"
    _fill(ballast)
    threading.Timer(0.5, ballast.unlink).start()
    writer.add(_rows(NUM_ROWS))
    assert writer.num_committed == 0
    writer.flush()
    assert writer.num_committed == NUM_ROWS and writer.num_retries > 0 and not writer.is_refused
    coverage = Coverage(run, NUM_ROWS)
    coverage.refresh()
    assert coverage.is_full


def test_full_disk_in_the_merge(small_disk: Path) -> None:
    """HDF5 must not crash the process at exit: the merge runs in one of its own, which must end by itself."""
    run = create_or_open(small_disk / "run", identity(2000))
    writer = SegmentWriter(run, "00" * 8, SegmentPolicy(max_rows=500))
    writer.add([stub_generation(row) for row in range(2000)])
    writer.flush()
    _fill(small_disk / "ballast", leave=40_000)
    code = (
        "import sys\nfrom hpcinfer.data.ledger.merge import merge_run\nfrom hpcinfer.data.ledger.run_directory import open_existing\n"
        "from hpcinfer.errors import ResumableError\n"
        "try:\n    merge_run(open_existing(sys.argv[1]), 2000)\n"
        "except ResumableError as error:\n    print(error); sys.exit(3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.path)], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "No space left" in done.stdout and "hpcinfer merge" in done.stdout
    assert not run.generations.exists() and not [n for n in os.listdir(run.path) if n.startswith(TEMPORARY_PREFIX)]
    (small_disk / "ballast").unlink()
    assert merge_run(run, 2000).complete
    check_output(run, 2000)


def _fill(ballast: Path, leave: int = 0) -> None:
    statistics = os.statvfs(ballast.parent)
    with open(ballast, "wb", buffering=0) as file:
        try:
            while True:
                if os.statvfs(ballast.parent).f_bavail * statistics.f_frsize <= leave:
                    return
                file.write(b"\0" * 4096)
        except OSError:
            return


def test_read_only_mount(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    run = create_or_open(folder / "begun", identity(NUM_ROWS))
    _mount(folder, "--bind", str(folder))
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        with pytest.raises(RunDirectoryError, match="read-only"):
            create_or_open(folder / "new", identity(NUM_ROWS))
        with pytest.raises(RunDirectoryError, match="read-only"):
            Replica(run.path, NUM_ROWS, policy=SegmentPolicy())
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("num_handles", [64])
def test_few_file_handles(tmp_path: Path, num_handles: int) -> None:
    """Hundreds of segments of many writers merge with 64 file handles."""
    run = create_or_open(tmp_path / "run", identity(1000))
    for index in range(200):
        writer = SegmentWriter(run, f"{index:016x}", SegmentPolicy(max_rows=5))
        writer.add([stub_generation(row) for row in range(index, 1000, 200)])
        writer.flush()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_handles, hard))
    try:
        result = merge_run(run, 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert result.complete and result.num_segments == 200
    check_output(run, 1000)


def test_a_million_rows_in_flat_memory(tmp_path: Path) -> None:
    """Ledger, segment writer and merge in a process of their own: prints rows/s, and stays under 1 GiB."""
    code = f"""
import resource, sys, time

from tests.faults.shim.harness import Replica, stub_generation
from hpcinfer.data.ledger.segments import SegmentPolicy
from hpcinfer.data.ledger.claims import Claim
n = 1_000_000
replica = Replica(sys.argv[1], n, policy=SegmentPolicy(max_rows=4096))
began = time.perf_counter()
while isinstance(claim := replica.ledger.next_claim(), Claim):
    replica.segments.add([stub_generation(row, sample) for row, sample, _ in replica.ledger.remaining(claim)])
replica.segments.close()
wrote = time.perf_counter() - began
began = time.perf_counter()
from hpcinfer.data.ledger.merge import merge_run
result = merge_run(replica.run, n)
merged = time.perf_counter() - began
assert result.complete and result.num_duplicates == 0
rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(f"ledger and writer {{n / wrote:.0f}} rows/s, merge {{n / merged:.0f}} rows/s, "
      f"{{result.num_segments}} segments, peak RSS {{rss:.2f}} GiB")
assert rss < 1.0
"""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False, timeout=280,
    )
    print(done.stdout, f"{time.monotonic() - began:.1f} s")
    assert done.returncode == 0, done.stderr
