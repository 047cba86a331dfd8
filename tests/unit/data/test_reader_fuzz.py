"""Readers under damage: whatever is done to a file, only our errors come out. And how fast they read."""

from __future__ import annotations

import json
import subprocess
import sys

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcinfer.data.inspect import describe, render
from hpcinfer.data.prompts.prompts_writer import PromptsWriter
from hpcinfer.data.prompts.reader import identity_of, open_prompts, sampling_for
from hpcinfer.errors import HpcinferError
from hpcinfer.request import SamplingParams

BLOBS = st.lists(st.binary(max_size=12), max_size=12)
OFFSETS = st.lists(st.integers(-3, 150) | st.sampled_from([2**62, -(2**62)]), min_size=1, max_size=14)


@given(
    data=st.binary(max_size=120),
    offsets=OFFSETS,
    tokens=st.booleans(),
    temperature=st.lists(st.floats(), max_size=13),
    stop=st.none() | BLOBS,
)
def test_packed_files_of_any_content(tmp_path_factory, data, offsets, tokens, temperature, stop):
    path = tmp_path_factory.mktemp("fuzz") / "p.h5"
    num_rows = len(offsets) - 1
    with h5py.File(path, "w") as file:
        values = np.frombuffer(data, np.uint8)
        file["prompts/data"] = values.astype(np.int64) - 100 if tokens else values
        file["prompts/offsets"] = np.array(offsets, np.int64)
        if len(temperature) >= num_rows:
            file["temperature"] = np.array(temperature[:num_rows], float)
        if stop is not None and len(stop) >= num_rows:
            stop = stop[:num_rows]
            file["stop_token_ids/data"] = np.frombuffer(b"".join(stop), np.uint8)
            file["stop_token_ids/offsets"] = np.cumsum([0] + [len(blob) for blob in stop])
    with open_prompts(path) as reader:
        rows = list(reader.rows())
        identity_of(reader)
        parts = [row for start in range(0, num_rows, 3) for row in reader.rows(start, min(start + 3, num_rows))]
    assert [row.row for row in rows] == list(range(num_rows))
    for row, again in zip(rows, parts, strict=True):
        assert (row.error, row.text) == (again.error, again.text)
        assert sum(value is not None for value in (row.text, row.token_ids, row.error)) == 1
        if row.token_ids is not None:
            assert len(row.token_ids) and row.token_ids.min() >= 0
        try:
            sampling_for(row, SamplingParams())
        except HpcinferError:
            continue


@pytest.mark.parametrize("layout", ["native", "strings", "padded"])
@settings(max_examples=60)
@given(
    flips=st.lists(st.tuples(st.integers(0, 2**20), st.integers(1, 255)), min_size=1, max_size=4), cut=st.integers(0, 9)
)
def test_flipped_bytes_and_cuts(tmp_path_factory, layout, flips, cut):
    path = tmp_path_factory.mktemp("fuzz") / "p.h5"
    if layout == "native":
        with PromptsWriter(path) as writer:
            for number in range(50):
                writer.append(f"prompt {number}", id=str(number), overrides={"seed": number, "stop_token_ids": [1]})
    else:
        with h5py.File(path, "w") as file:
            if layout == "strings":
                file.create_dataset("text", data=[f"p{n}" for n in range(50)], dtype=h5py.string_dtype())
            else:
                file["input_ids"] = np.ones((50, 8), np.int32)
                file["attention_mask"] = np.ones((50, 8), np.int8)
    content = bytearray(path.read_bytes())
    for place, bits in flips:
        content[place % len(content)] ^= bits
    path.write_bytes(content[: len(content) - cut * 100])
    try:
        render(describe(path))
        with open_prompts(path) as reader:
            list(reader.rows(0, min(reader.num_rows, 1000)))
            identity_of(reader, min(reader.num_rows, 1000))
    except HpcinferError:
        return


_SPEED = """
import json, sys, time
import h5py
from hpcinfer.data.prompts.prompts_writer import PromptsWriter
from hpcinfer.data.prompts.reader import open_prompts
def peak_mib():
    # Not getrusage: its peak is inherited from the process that started this one.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
path, num_rows = sys.argv[1], int(sys.argv[2])
begin = time.perf_counter()
with PromptsWriter(path) as writer:
    for row in range(num_rows):
        writer.append("the prompt with the number %d of them all" % row)
wrote = time.perf_counter()
with h5py.File(path, locking=False) as file:
    before = peak_mib()
    data, offsets = file["prompts/data"], file["prompts/offsets"]
    for first in range(0, num_rows, 16384):
        block = offsets[first : first + 16385]
        data[block[0] : block[-1]]
raw = time.perf_counter()
with open_prompts(path) as reader:
    count = sum(row.text is not None for row in reader.rows())
read = time.perf_counter()
print(json.dumps({
    "rows": count, "written_rows_per_s": round(num_rows / (wrote - begin)),
    "read_rows_per_s": round(num_rows / (read - raw)),
    "raw_h5py_rows_per_s": round(num_rows / (raw - wrote)), "read_growth_mib": peak_mib() - before,
}))
"""


def test_a_million_rows_stream(tmp_path):
    num_rows = 1_000_000
    command = [sys.executable, "-c", _SPEED, tmp_path / "p.h5", str(num_rows)]
    measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(measured)
    assert measured["rows"] == num_rows
    assert measured["read_growth_mib"] < 100
    # Far below what was measured (about 800,000): other processes share the cores. Tokenising is ten times slower.
    assert measured["read_rows_per_s"] > 50_000
