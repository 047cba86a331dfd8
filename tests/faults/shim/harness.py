"""Lives of a stub replica under the shim. Run as a script with LD_PRELOAD; forks one child a life: one import for all.

    harness.py SCENARIO SHIM.so SCRATCH ACTION CALLS...
    harness.py race SCRATCH NUM_PROCESSES NUM_KILLS NUM_ROWS NUM_SAMPLES SEED

For every call number in CALLS (`all`, or numbers) a fresh run directory gets a life that is hit at that call; the
parent then checks what is there, lets a second life finish, and checks again. The last line printed is JSON: counts of
what happened.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hpcinfer.data.ledger.coverage import BadSegments, Coverage, list_segments
from hpcinfer.data.generations import GenerationFile
from hpcinfer.data.ledger.claims import Claim, Ledger, NoClaim
from hpcinfer.data.ledger.liveness import Liveness
from hpcinfer.data.ledger.merge import claim_merge, merge_run, remove_leftovers
from hpcinfer.data.ledger.run_directory import RunDirectory, RunIdentity, create_or_open
from hpcinfer.data.ledger.segments import SegmentPolicy, SegmentWriter
from hpcinfer.data.ledger.writers import WriterIdentity, register_writer
from hpcinfer.errors import ResumableError
from hpcinfer.request import FinishReason, Generation, Status

ACTIONS = {"kill-before": 1, "kill-after": 2, "torn": 3, "fail-one": 4, "fail-from": 5, "short": 6}


def stub_generation(row: int, sample: int = 0, *, partial: bool = False) -> Generation:
    """What the stub model says to a row: a function of the row alone, every seventh fails."""
    if row % 7 == 3 and not partial:
        return Generation(row=row, sample=sample, status=Status.FAILED, error=f"row {row} cannot be run")
    tokens = np.arange(row, row + 3 + row % 11, dtype=np.int32)
    return Generation(
        row=row,
        sample=sample,
        status=Status.PARTIAL if partial else Status.OK,
        finish_reason=FinishReason.NONE if partial else FinishReason.STOP,
        token_ids=tokens[:2] if partial else tokens,
        text="" if partial else f"answer to {row}.{sample} é" * (1 + row % 5),
        num_prompt_tokens=5,
    )


def identity(num_rows: int, num_samples: int = 1) -> RunIdentity:
    return RunIdentity(
        input_fingerprint="f0",
        num_rows=num_rows,
        num_samples=num_samples,
        model={"config": "m"},
        sampling={"temperature": 0.0},
    )


def check_output(run: RunDirectory, num_rows: int) -> None:
    """generations.h5 holds each (row, sample) once, as the stub gives it."""
    with GenerationFile(run.generations) as file:
        assert file.complete and file.run_uuid == run.uuid
        keys = itertools.product(range(num_rows), range(run.num_samples))
        for key, found in zip(keys, file, strict=True):
            expected = stub_generation(*key)
            assert found.key == key and found.status == expected.status and found.text == expected.text, (key, found)
            assert found.error == expected.error and np.array_equal(found.token_ids, expected.token_ids), (key, found)


class Replica:
    """One life: claims rows, commits what the stub says, merges at the end."""

    def __init__(
        self, path: Path, num_rows: int, num_samples: int = 1, *, policy: SegmentPolicy, stale_after_s: float = 120.0
    ) -> None:
        self.num_rows = num_rows
        self.run = create_or_open(path, identity(num_rows, num_samples))
        self.writer = register_writer(self.run, WriterIdentity.of_this_process(), interval_s=0.05)
        self.liveness = Liveness(self.run, stale_after_s=stale_after_s)
        self.bad = BadSegments(self.run, after_s=0.2)
        coverage = Coverage(self.run, num_rows, bad_segments=self.bad)
        self.ledger = Ledger(self.run, self.writer.id, self.liveness, coverage, min_scan_s=0.02, retry_s=0.3)
        self.segments = SegmentWriter(self.run, self.writer.id, policy, on_commit=self.ledger.coverage.add_table)

    def live(
        self,
        *,
        acknowledge: Callable[[int], None] = lambda count: None,
        drain_after: int | None = None,
        pause: Callable[[], None] = lambda: None,
    ) -> bool:
        """Runs to the end (or leaves after `drain_after` claims with a partial row). Returns whether the run is
        complete.
        """
        self.writer.set_state("running")
        num_claims = 0
        while True:
            claim = self.ledger.next_claim(idle=self.segments.num_waiting == 0)
            if isinstance(claim, Claim):
                num_claims += 1
                for row, sample, earlier in self.ledger.remaining(claim):
                    if drain_after is not None and num_claims > drain_after:
                        self.segments.add([stub_generation(row, sample, partial=True)])
                        break
                    if earlier is not None:
                        assert np.array_equal(earlier.token_ids, stub_generation(row, sample, partial=True).token_ids)
                    self.segments.add([stub_generation(row, sample)])
                    acknowledge(self.segments.num_committed)
                    pause()
                self.writer.step_finished(rows_ok=self.segments.num_ok, rows_failed=self.segments.num_failed)
                if drain_after is not None and num_claims > drain_after:
                    break
            elif self.segments.num_waiting:
                self.segments.flush()
                acknowledge(self.segments.num_committed)
            elif claim is NoClaim.DONE:
                break
            else:
                self.writer.step_finished()
                time.sleep(0.02)
        self.segments.close()
        acknowledge(self.segments.num_committed)
        complete = self.ledger.coverage.is_full
        to_merge = complete and not self.run.is_complete(self.num_rows)
        if to_merge and claim_merge(self.run, self.writer.id, self.liveness):
            self.writer.set_state("merging")
            merge_run(
                self.run, self.num_rows, bad_segments=self.bad, progress=self.writer.step_finished, owner=self.writer.id
            )
        if complete:
            remove_leftovers(self.run, self.liveness)
        self.writer.leave()
        return complete


POLICY = SegmentPolicy(max_rows=5, max_age_s=60, retry_s=0.3, backoff_s=0.02, max_segments=3)
NUM_ROWS = 24


def run_in_child(work: Callable[[Callable[[int], None]], None]) -> tuple[int, int]:
    """(wait status, last number acknowledged) of a forked child that does `work`."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        code = 1
        try:
            work(lambda count: os.write(write_end, b"%d\n" % count))
            code = 0
        except ResumableError:
            code = 3
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        lines = pipe.read().split()
    return os.waitpid(pid, 0)[1], int(lines[-1]) if lines else 0


def committed_rows(path: Path) -> int:
    """Rows in valid segments, each checked whole and against the stub."""
    keys = set()
    run = create_or_open(path, identity(NUM_ROWS))
    names, bad = list_segments(run)
    assert not bad, "a committed segment was found to be damaged"
    for name in names:
        with GenerationFile(run.segments / name) as file:
            for found in file:
                expected = stub_generation(*found.key, partial=found.status == Status.PARTIAL)
                assert found.text == expected.text and np.array_equal(found.token_ids, expected.token_ids)
                keys.add(found.key)
    return len(keys)


def complete_life(path: Path, num_rows: int = NUM_ROWS, num_samples: int = 1) -> None:
    """A life that nothing disturbs."""
    assert Replica(path, num_rows, num_samples, policy=POLICY).live()


def race(scratch: str, num_processes: int, num_kills: int, num_rows: int, num_samples: int, seed: int) -> None:
    """Several lives at once on one run directory, started before it exists; some are killed and replaced."""
    rng = random.Random(seed)
    path = Path(tempfile.mkdtemp(dir=scratch)) / "run"
    policy = SegmentPolicy(max_rows=40, max_age_s=0.2, max_segments=4)

    def start() -> int:
        pause_seed = rng.random()
        pid = os.fork()
        if pid == 0:
            pauses = random.Random(pause_seed)
            code = 1
            try:
                replica = Replica(path, num_rows, num_samples, policy=policy)
                replica.live(pause=lambda: time.sleep(pauses.random() * 0.004))
                code = 0
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(code)
        return pid

    began = time.monotonic()
    alive = [start() for _ in range(num_processes)]
    for _ in range(num_kills):
        time.sleep(rng.random() * 0.4)
        victim = alive.pop(rng.randrange(len(alive)))
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        alive.append(start())
    for pid in alive:
        status = os.waitpid(pid, 0)[1]
        assert status == 0, f"a life ended with {status}"
    # The life that merges may have been killed, or the last ones left while it merged: one more finds all done.
    run_in_child(lambda acknowledge: complete_life(path, num_rows, num_samples))
    run = create_or_open(path, identity(num_rows, num_samples))
    check_output(run, num_rows)
    stored = sum(len(GenerationFile(run.segments / name)) for name in list_segments(run)[0])
    claims = os.listdir(run.claims)
    print(
        json.dumps(
            {
                "duplicates": stored - num_rows * num_samples,
                "takeovers": sum(not name.endswith(".0") for name in claims if not name.startswith("merge")),
                "claims": len(claims),
                "segments": len(list_segments(run)[0]),
                "uuids": len({run.uuid}),
                "writers": len([name for name in os.listdir(run.writers) if name.endswith(".json")]),
                "seconds": round(time.monotonic() - began, 1),
            }
        )
    )
    shutil.rmtree(path.parent)


def main(scenario: str, shim_path: str, scratch: str, action: str, *which: str) -> None:
    shim = ctypes.CDLL(shim_path)
    error = getattr(errno, os.environ.get("SHIM_ERRNO", "ENOSPC"))
    drain_after = 1 if scenario == "drain" else None
    outcomes: dict[str, int] = {"killed": 0, "resumable": 0, "undisturbed": 0, "acknowledged": 0}
    numbers = itertools.count(1) if which == ("all",) else [int(number) for number in which]
    for number in numbers:
        path = Path(tempfile.mkdtemp(dir=scratch)) / "run"

        def first_life(acknowledge: Callable[[int], None], number: int = number, path: Path = path) -> None:
            if scenario == "whole":
                shim.shim_arm(str(path).encode(), number, ACTIONS[action], error)
            replica = Replica(path, NUM_ROWS, policy=POLICY)
            if scenario != "whole":
                folder = path / "segments" if scenario == "commit" else path
                shim.shim_arm(str(folder).encode(), number, ACTIONS[action], error)
            replica.live(acknowledge=acknowledge, drain_after=drain_after)
            calls = shim.shim_disarm()
            os._exit(0 if calls >= number else 77)

        status, acknowledged = run_in_child(first_life)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 77:
            break  # The life has fewer calls than that.
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL, f"signal {os.WTERMSIG(status)} at call {number}"
            outcomes["killed"] += 1
        else:
            assert os.WEXITSTATUS(status) in (0, 3), f"exit {os.WEXITSTATUS(status)} at call {number}"
            outcomes["resumable" if os.WEXITSTATUS(status) == 3 else "undisturbed"] += 1
        if acknowledged:
            assert committed_rows(path) >= acknowledged, f"acknowledged rows lost at call {number}"
        outcomes["acknowledged"] += acknowledged
        status, _ = run_in_child(lambda acknowledge, path=path: complete_life(path))
        assert status == 0, f"the second life failed after call {number}"
        check_output(create_or_open(path, identity(NUM_ROWS)), NUM_ROWS)
        left = [name for _, _, names in os.walk(path) for name in names if name.startswith(".tmp-")]
        assert all("run.json" in name for name in left), f"left behind after call {number}: {left}"
        shutil.rmtree(path.parent)
    print(json.dumps({**outcomes, "lives": sum(outcomes[key] for key in ("killed", "resumable", "undisturbed"))}))


if __name__ == "__main__":
    if sys.argv[1] == "race":
        race(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        main(*sys.argv[1:])
