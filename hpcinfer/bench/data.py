"""Rows through everything but the model: convert, reader, tokenizer, ledger, segment writer, merge.

A stub stands for the model: each request ends in the next tick with a few fixed tokens. Limited by: Python's own work for
each row; beside the figures stand those of plain h5py on the same machine in the same run, which are limited by memory
copies and the file system.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import time
from pathlib import Path

import h5py
import numpy as np

from hpcinfer.config.job import CommSection
from hpcinfer.data.convert.driver import convert
from hpcinfer.data.ledger.coverage import Coverage
from hpcinfer.data.ledger.claims import Ledger
from hpcinfer.data.ledger.liveness import Liveness
from hpcinfer.data.ledger.merge import merge_run
from hpcinfer.data.prompts.reader import open_prompts
from hpcinfer.data.ledger.run_directory import RunDirectory, RunIdentity, create_or_open
from hpcinfer.data.ledger.segments import SegmentWriter
from hpcinfer.data.tokenize import Tokenizer
from hpcinfer.data.ledger.writers import WriterIdentity, register_writer
from hpcinfer.launch.signals import DrainFlag
from hpcinfer.observe.metrics import PhaseClock
from hpcinfer.request import FinishReason, Request, SamplingParams
from hpcinfer.runner.drain import DrainPlan
from hpcinfer.runner.feed import RowFeed
from hpcinfer.runner.replica_loop import ReplicaLoop
from hpcinfer.scheduler.limits import SchedulerCounters
from hpcinfer.scheduler.scheduler import EndedSequence

_STUB_TOKENS = np.arange(65, 81, dtype=np.int32)
_STUB_SEQUENCES = 256
_CHUNK_BYTES = 64 * 1024


class StubReplica:
    """Ends every request one tick after it came, with the same tokens. Stands where a Replica does."""

    def __init__(self) -> None:
        self._working: collections.deque[Request] = collections.deque()
        self.counters = SchedulerCounters()

    @property
    def scheduler(self) -> StubReplica:
        return self

    @property
    def num_sequences(self) -> int:
        return len(self._working)

    @property
    def is_idle(self) -> bool:
        return not self._working

    def refuse(self, request: Request) -> None:
        """Takes every request."""

    def step(self, requests: list[Request], *, give_back: bool = False, drain: bool = False) -> list[EndedSequence]:
        """One tick."""
        ended = [
            EndedSequence(request=request, output_token_ids=_STUB_TOKENS, reason=FinishReason.LENGTH)
            for request in self._working
        ]
        self._working = collections.deque(requests)
        return ended


def run_data(folder: Path, num_rows: int, model: str) -> dict:
    """Send `num_rows` short prompts through in an empty `folder`; return rows per second of every part, and peak memory.

    Args:
        folder: where files are made; some 300 bytes a row.
        model: folder whose tokenizer is used.
    """
    seconds: dict[str, float] = {}
    with _timed(seconds, "write_jsonl"):
        _write_jsonl(folder / "prompts.jsonl", num_rows)
    with _timed(seconds, "convert"):
        convert([str(folder / "prompts.jsonl")], str(folder / "prompts.h5"))
    with _timed(seconds, "reader"), open_prompts(folder / "prompts.h5") as reader:
        assert sum(1 for _ in reader.rows()) == num_rows
    run = create_or_open(
        folder / "run", RunIdentity(input_fingerprint="bench", num_rows=num_rows, model={}, sampling={})
    )
    with _timed(seconds, "loop"):
        committed = _loop(run, folder / "prompts.h5", num_rows, model)
    with _timed(seconds, "merge"):
        result = merge_run(run, num_rows)
    raw = _raw_h5py(folder / "raw.h5", num_rows)
    return {
        "benchmark": "data",
        "rows": num_rows,
        "rows_committed": committed,
        "rows_merged": result.num_ok,
        "complete": result.complete,
        "rows_per_s": {name: num_rows / spent for name, spent in seconds.items()},
        "raw_h5py_rows_per_s": raw,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _loop(run: RunDirectory, prompts: Path, num_rows: int, model: str) -> int:
    """Reader, tokenizer, ledger and segment writer around the stub."""
    writer = register_writer(run, WriterIdentity.of_this_process(num_rows=num_rows))
    coverage = Coverage(run, num_rows)
    segments = SegmentWriter(run, writer.id, on_commit=coverage.add_table)
    ledger = Ledger(run, writer.id, Liveness(run), coverage)
    tokenizer = Tokenizer(model)
    replica = StubReplica()
    drain = DrainPlan(DrainFlag(), drain_s=0.0, margin_s=0.0, left_s=None)
    with open_prompts(prompts) as reader:
        feed = RowFeed(
            ledger, reader, tokenizer, SamplingParams(), refuse=replica.refuse, vocab_size=tokenizer.vocab_size
        )
        ReplicaLoop(
            replica=replica, feed=feed, ledger=ledger, segments=segments, writer=writer, tokenizer=tokenizer,
            max_sequences=_STUB_SEQUENCES, linger_s=0.0, failed_before=0, max_failed=0, drain=drain, say=print,
            clock=PhaseClock(), deadline_s=CommSection().deadline_s, on_tick=lambda figures: None,
        ).run()
    writer.leave()
    return segments.num_committed


def _write_jsonl(path: Path, num_rows: int) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for row in range(num_rows):
            file.write(json.dumps({"prompt": f"sort {row * 7 % 10} {row % 10} {row // 10 % 10}:"}) + "\n")


def _raw_h5py(path: Path, num_rows: int) -> dict[str, float]:
    """Rows per second of plain h5py for rows of 20 bytes, packed."""
    data = np.zeros(num_rows * 20, np.uint8)
    offsets = np.arange(num_rows + 1, dtype=np.int64) * 20
    seconds: dict[str, float] = {}
    with _timed(seconds, "write"), h5py.File(path, "w") as file:
        chunks = (min(_CHUNK_BYTES, len(data)),)
        file.create_dataset("data", data=data, chunks=chunks, fletcher32=True)
        file.create_dataset("offsets", data=offsets)
    with _timed(seconds, "read"), h5py.File(path, "r") as file:
        data, offsets = file["data"][:], file["offsets"][:]
        for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            data[start:stop].tobytes()
    return {name: num_rows / spent for name, spent in seconds.items()}


def peak_memory_bytes() -> int:
    """Most memory that this process held; ru_maxrss would also tell what its parent held when it was forked."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


@dataclasses.dataclass
class _timed:
    """Adds the seconds of a block to `seconds[name]`."""

    seconds: dict[str, float]
    name: str

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] = time.perf_counter() - self._start
