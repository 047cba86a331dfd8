"""Extents: every needed byte is in one of them, is read once, and comes to its tensor; files that cannot be read."""

from __future__ import annotations

import errno
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.comm.local import LocalCommunicator
from hpcinfer.errors import CheckpointError
from hpcinfer.models import extent_reader
from hpcinfer.models.extent_reader import ExtentReader
from hpcinfer.models.extents import EXTENT_BYTES, MAX_EXTENT_BYTES, plan_extents
from hpcinfer.models.safetensors_file import DTYPES, TensorEntry
from hpcinfer.models.weight_stream import WeightStream
from hpcinfer.models.weights import StageFiller

TENSORS = st.lists(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["U8", "BF16", "F32"]), st.integers(1, 40)), max_size=8),
    min_size=1, max_size=4,
)
"""Files of tensors: bytes before it that are nobody's, dtype, elements."""


def write_files(folder: Path, files) -> dict[str, TensorEntry]:
    """Files of random bytes, and where their tensors lie: anywhere, as in files whose data are not aligned."""
    rng = np.random.default_rng(0)
    entries = {}
    for number, tensors in enumerate(files):
        path, end = folder / f"model-{number}.safetensors", 5
        for index, (gap, dtype, count) in enumerate(tensors):
            start, end = end + gap, end + gap + count * DTYPES[dtype].itemsize
            entries[f"{number}.{index}"] = TensorEntry(f"{number}.{index}", path, dtype, (count,), start, end)
        path.write_bytes(rng.bytes(end + 3))
    return entries


def stored(entry: TensorEntry) -> bytes:
    return entry.path.read_bytes()[entry.start : entry.end]


def counted_reads(patch: pytest.MonkeyPatch, most: int | None = None) -> list[tuple[str, int, int]]:
    """Notes every read: file, first byte, bytes. With `most`, the file system gives no more at once."""
    reads = []
    preadv = os.preadv

    def noting(descriptor, buffers, offset):
        buffers = [buffers[0][:most]]
        count = preadv(descriptor, buffers, offset)
        reads.append((os.readlink(f"/proc/self/fd/{descriptor}"), offset, count))
        return count

    patch.setattr(os, "preadv", noting)
    return reads


def collect(entries: dict[str, TensorEntry], extent_bytes: int, wanted=None) -> tuple[dict[str, torch.Tensor], WeightStream]:
    """Bring all tensors to one rank; the tensors as their loaders got them."""
    got = {}
    filler = StageFiller(
        {name: lambda full, name=name: got.update({name: full.clone()}) for name in wanted or entries}, entries
    )
    stream = WeightStream(plan_extents(entries, extent_bytes), LocalCommunicator("weights"), [0])
    error = stream.run(filler.take)
    if error is not None:
        raise error
    filler.check_complete()
    return got, stream


@given(TENSORS, st.one_of(st.integers(1, 30), st.integers(31, 2000)))
def test_extents_are_complete_disjoint_and_in_order(files, extent_bytes):
    with tempfile.TemporaryDirectory() as folder:
        entries = write_files(Path(folder), files)
    extents = plan_extents(dict(reversed(entries.items())), extent_bytes)
    total = sum(entry.num_bytes for entry in entries.values())
    assert [extent.num_bytes for extent in extents] == [
        min(extent_bytes, total - start) for start in range(0, total, extent_bytes)
    ]
    in_file_order = [
        (entry.path, byte) for entry in sorted(entries.values(), key=lambda entry: (entry.path, entry.start))
        for byte in range(entry.start, entry.end)
    ]
    pieces = [piece for extent in extents for piece in extent.pieces]
    assert [(p.path, p.start + i) for p in pieces for i in range(p.num_bytes)] == in_file_order
    for piece in pieces:
        assert piece.start == entries[piece.name].start + piece.tensor_offset
    for most in (7, MAX_EXTENT_BYTES):
        for extent in extents:
            ranges = list(extent.ranges(most))
            for parts in (extent.pieces, ranges):
                assert [part.offset for part in parts] == [sum(p.num_bytes for p in parts[:i]) for i in range(len(parts))]
            assert max(r.num_bytes for r in ranges) <= most
        ranges = [r for extent in extents for r in extent.ranges(most)]
        assert [(r.path, r.start + i) for r in ranges for i in range(r.num_bytes)] == in_file_order


@given(TENSORS, st.one_of(st.integers(1, 30), st.integers(31, 2000)), st.sampled_from([None, 1, 5]))
def test_tensors_are_what_the_files_have(files, extent_bytes, most):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        entries = write_files(Path(folder), files)
        wanted = [name for name in entries if name.endswith(("0", "2"))] or None
        reads = counted_reads(patch, most)
        patch.setattr(extent_reader, "READ_BYTES", 64)
        got, stream = collect(entries, extent_bytes, wanted)
        assert got.keys() == set(wanted or entries)
        for name, tensor in got.items():
            assert tensor.dtype == DTYPES[entries[name].dtype] and tensor.shape == entries[name].shape
            assert tensor.view(torch.uint8).numpy().tobytes() == stored(entries[name]), name
        read_bytes = sorted((path, start + i) for path, start, count in reads for i in range(count))
        assert read_bytes == sorted((str(e.path), i) for e in entries.values() for i in range(e.start, e.end))
        assert stream.bytes_read == len(read_bytes)


def test_neighbours_are_read_at_once_and_large_extents_in_parts(tmp_path, monkeypatch):
    entries = write_files(tmp_path, [[(0, "U8", 300), (0, "F32", 100), (2, "U8", 9)], [(0, "U8", 50)]])
    reads = counted_reads(monkeypatch)
    collect(entries, 10_000)
    assert sorted((Path(path).name, start, count) for path, start, count in reads) == [
        ("model-0.safetensors", 5, 700), ("model-0.safetensors", 707, 9), ("model-1.safetensors", 5, 50),
    ]
    reads.clear()
    monkeypatch.setattr(extent_reader, "READ_BYTES", 256)
    collect(entries, 10_000)
    assert sorted(count for _, _, count in reads) == [9, 50, 188, 256, 256]


def test_only_two_extents_are_read_ahead(tmp_path, monkeypatch):
    entries = write_files(tmp_path, [[(0, "U8", 100)]])
    reads = counted_reads(monkeypatch)
    with ExtentReader(plan_extents(entries, 10)) as reader:
        for number in range(10):
            deadline = time.monotonic() + 10
            while len(reads) < min(number + 2, 10) and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.005)
            assert len(reads) == min(number + 2, 10)
            reader.take(torch.empty(10, dtype=torch.uint8))
    assert not [link for link in os.listdir("/proc/self/fd") if "model-0" in _link(link)], "files are closed"


def _link(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""  # the listing's own


def test_the_default_extent_fits_a_transfer():
    assert EXTENT_BYTES <= MAX_EXTENT_BYTES < 2**31 - 1
    with pytest.raises(AssertionError):
        plan_extents({}, MAX_EXTENT_BYTES + 1)
    assert plan_extents({}) == [] and collect({}, 10)[0] == {}


@pytest.mark.parametrize("damage", ["shorter", "gone", "no file", "input/output"])
def test_a_file_that_cannot_be_read_any_more(tmp_path, damage, monkeypatch):
    entries = write_files(tmp_path, [[(0, "U8", 100)] * 3, [(0, "U8", 100)] * 3])
    path = tmp_path / "model-1.safetensors"
    words = {"shorter": "has become shorter", "gone": "No such file", "no file": "directory", "input/output": "Input/output"}
    if damage == "shorter":
        os.truncate(path, 200)
    elif damage == "input/output":
        preadv = os.preadv

        def failing(descriptor, buffers, offset):
            if os.readlink(f"/proc/self/fd/{descriptor}") == str(path):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return preadv(descriptor, buffers, offset)

        monkeypatch.setattr(os, "preadv", failing)
    else:
        path.unlink()
        if damage == "no file":
            path.mkdir()
    for extent_bytes in (10, 77, 1000):
        with pytest.raises(CheckpointError, match=f"(?s)model-1.*{words[damage]}|{words[damage]}.*model-1") as error:
            collect(entries, extent_bytes)
        assert os.uname().nodename in error.value.found


def test_a_refused_tensor_ends_the_stream_soon(tmp_path):
    entries = write_files(tmp_path, [[(0, "U8", 100)] * 3])
    seen = []

    def refuse(full: torch.Tensor) -> None:
        raise CheckpointError("refused")

    filler = StageFiller({"0.0": refuse}, entries)

    def take(extent, data):
        seen.append(extent)
        filler.take(extent, data)

    error = WeightStream(plan_extents(entries, 10), LocalCommunicator("weights"), [0]).run(take)
    assert str(error) == "refused" and len(seen) == 10, "the tensor has ten extents of thirty"


def test_an_assembled_tensor_is_the_only_one_that_is_kept(tmp_path):
    entries = write_files(tmp_path, [[(1, "F32", 300), (0, "BF16", 301)]])
    filler = StageFiller(dict.fromkeys(entries, lambda full: None), entries)

    def take(extent, data):
        filler.take(extent, data)
        held = 0 if filler._partial is None else filler._partial.nbytes
        assert held in (0, *(entry.num_bytes for entry in entries.values()))

    WeightStream(plan_extents(entries, 64), LocalCommunicator("weights"), [0]).run(take)
    assert filler._partial is None
