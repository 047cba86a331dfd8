"""The trace of one rank as a file: `<run directory>/trace/<start>-rank<r>.npz`.

One array a column of `trace.Record`, over the R records in the order of their start; texts are numbers into a table.
The header is a JSON object:

    rank, host, boot_id, started     who; ranks with one boot_id share a clock
    layout, coordinates              the mesh as text; this rank's replica, stage, lane and tp
    communicators                    name -> world ranks, in the communicator's order
    start_s, end_s                   time.perf_counter at the first and last moment of the trace
    start_unix_s, end_unix_s         the same moments on the host's wall clock
    clock                            this rank's clock minus rank 0's: a list of {at_s, offset_s, error_s}
    dropped                          true where there were too many records: the oldest are missing
    complete                         false where the rank ended with an error
    versions                         of hpcinfer, Python and numpy
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hpcinfer.errors import DataError
from hpcinfer.observe.trace import Record, Recorder

FORMAT = "hpcinfer-trace"
VERSION = 1
_TEXTS = ("track", "name", "verb", "dtype", "shape")
_TYPES = {"kind": np.uint8, "tick": np.int64, "part": np.int8, "bytes": np.int64, "peer": np.int32, "number": np.int64}
_NAME = re.compile(r"(?P<start>.+)-rank(?P<rank>\d+)\.npz")


_FACTS = (
    "rank", "num_ranks", "host", "started", "layout", "coordinates", "communicators", "start_s", "end_s", "clock", "dropped",
)
"""What every header has."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """The records of one rank, R of them, by start. Columns are arrays [R] with the names of `trace.Record`."""

    header: Mapping[str, Any]
    columns: Mapping[str, np.ndarray]
    """Texts as int32 numbers into `texts`; times float64 seconds, others integers."""
    texts: tuple[str, ...]

    @property
    def rank(self) -> int:
        return self.header["rank"]

    def __getitem__(self, column: str) -> np.ndarray:
        return self.columns[column]

    def __len__(self) -> int:
        return len(self.columns["kind"])

    def text(self, column: str) -> np.ndarray:
        """A column of texts as an object array [R] of str."""
        return np.array(self.texts, object)[self.columns[column]]

    def code(self, text: str) -> int:
        """The number of a text; -1 where no record has it."""
        return self.texts.index(text) if text in self.texts else -1

    def records(self) -> list[Record]:
        """All records as tuples with their texts and shapes."""
        rows = zip(*(self.columns[name].tolist() for name in Record._fields), strict=True)
        return [self._record(row) for row in rows]

    def _record(self, row: tuple) -> Record:
        values = dict(zip(Record._fields, row, strict=True))
        for name in _TEXTS:
            values[name] = self.texts[values[name]]
        values["shape"] = tuple(int(size) for size in values["shape"].split("x") if size)
        return Record(**values)


def save_trace(folder: Path, recorder: Recorder, header: Mapping[str, Any]) -> Path:
    """Write a rank's records, whole or not at all. `header`: see the module; format, version, dropped are added here.

    Raises OSError.
    """
    rows = recorder.rows()
    values = dict(zip(Record._fields, zip(*rows, strict=True) if rows else ((),) * len(Record._fields), strict=True))
    table: dict[str, int] = {}
    columns = {name: _column(name, column, table) for name, column in values.items()}
    facts = {**header, "format": FORMAT, "version": VERSION, "dropped": recorder.is_full}
    image = io.BytesIO()
    np.savez_compressed(image, header=_bytes(facts), texts=_bytes(list(table)), **columns)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{header['started']}-rank{header['rank']}.npz"
    temporary = folder / f".tmp-{path.name}.{os.getpid()}"
    try:
        temporary.write_bytes(image.getbuffer())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load_trace(path: Path) -> Trace:
    """Read one rank's file. Raises DataError where it is none."""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            header = json.loads(file["header"].tobytes())
            texts = tuple(json.loads(file["texts"].tobytes()))
            columns = {name: file[name] for name in Record._fields}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"{path} is not a trace", found=f"{type(error).__name__}: {error}") from error
    except Exception as error:  # zipfile and zlib have errors of their own
        raise DataError(f"{path} is damaged", found=f"{type(error).__name__}: {error}") from error
    if not isinstance(header, dict):
        raise DataError(f"{path} is not a trace", found=f"a header that is a JSON {type(header).__name__}")
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise DataError(
            f"{path} was written by another version of hpcinfer", found=f"version {header.get('version')!r}",
            fix=f"this one reads version {VERSION}",
        )
    missing = [name for name in _FACTS if name not in header]
    if missing:
        raise DataError(f"{path} is damaged", found=f"a header without {', '.join(missing)}")
    return Trace(header=header, columns=columns, texts=texts)


def load_start(folder: Path, start: str = "") -> list[Trace]:
    """The traces of all ranks of one start, by rank.

    Args:
        folder: `<run directory>/trace`.
        start: its name; the newest by default.

    Raises:
        DataError: there is none, or not of that name.
    """
    starts: dict[str, list[tuple[int, Path]]] = {}
    for path in folder.glob("*.npz") if folder.is_dir() else ():
        if match := _NAME.fullmatch(path.name):
            starts.setdefault(match["start"], []).append((int(match["rank"]), path))
    if not starts:
        raise DataError(f"no traces in {folder}", fix="run the job with --trace, or --set run.trace=true")
    if start and start not in starts:
        raise DataError(f"no trace of a start {start!r} in {folder}", found=", ".join(sorted(starts)))
    start = start or max(starts)
    traces = []
    for rank, path in sorted(starts[start]):
        trace = load_trace(path)
        if (trace.rank, trace.header["started"]) != (rank, start):
            raise DataError(
                f"{path} is another rank's trace", found=f"rank {trace.rank} of start {trace.header['started']!r}",
                fix="remove the file, or give it back its name",
            )
        traces.append(trace)
    return traces


def on_common_clock(trace: Trace) -> Trace:
    """The same trace with all times on rank 0's clock. Ranks of one boot share a clock: theirs are not touched."""
    clock = trace.header["clock"]
    if not clock or trace.header.get("same_clock"):
        return trace
    at, offsets = np.array([[point["at_s"], point["offset_s"]] for point in clock]).T

    def moved(times: np.ndarray) -> np.ndarray:
        return times - np.interp(times, at, offsets)

    columns = dict(trace.columns)
    for name in ("start_s", "end_s", "issued_s"):
        columns[name] = moved(columns[name])
    header = dict(trace.header)
    for name in ("start_s", "end_s"):
        header[name] = float(moved(np.array(header[name])))
    return dataclasses.replace(trace, columns=columns, header=header)


def _column(name: str, values: tuple, table: dict[str, int]) -> np.ndarray:
    if name == "shape":
        values = tuple("x".join(map(str, shape)) for shape in values)
    if name in _TEXTS:
        return np.array([table.setdefault(value, len(table)) for value in values], np.int32)
    return np.array(values, _TYPES.get(name, np.float64))


def _bytes(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)
