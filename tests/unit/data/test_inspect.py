"""Descriptions of every kind of file that we write, and of those that we do not."""

from __future__ import annotations

import dataclasses
import json

import h5py
import numpy as np
import pytest

from hpcinfer.data.generations import encode_generations
from hpcinfer.data.inspect import describe, render
from hpcinfer.data.prompts.prompts_writer import PromptsWriter
from hpcinfer.errors import DataError
from hpcinfer.request import Generation, Status


def _described(path, **settings):
    description = describe(path, **settings)
    json.dumps(dataclasses.asdict(description))
    assert render(description)
    return description


def _prompts(path):
    with PromptsWriter(path) as writer:
        writer.append("hello\n" * 100, id="a", overrides={"max_tokens": 3, "stop_token_ids": [1, 2]})
        writer.append("wörld")
    return path


def test_prompts(tmp_path):
    description = _described(_prompts(tmp_path / "p.h5"))
    assert (description.kind, description.num_rows, description.layout) == ("prompts", 2, "prompts v1")
    assert description.columns["/prompts/data"] == "[606] uint8"
    assert description.attributes["n_rows"] == 2
    assert description.first_rows[0]["max_tokens"] == 3 and description.first_rows[1]["prompt"] == "wörld"
    assert "wörld" in render(description) and "(600 characters)" in render(description)
    assert len(_described(tmp_path / "p.h5", num_rows=1).first_rows) == 1
    assert _described(tmp_path / "p.h5", num_rows=0).first_rows == []


def test_shards_and_foreign_layouts(tmp_path):
    for number in range(2):
        with h5py.File(tmp_path / f"{number}.h5", "w") as file:
            file["input_ids"] = np.array([[1, 2], [-1, 0]])
    description = _described(tmp_path)
    assert description.num_rows == 4 and description.contents["files"] == 2
    assert "negative" in description.first_rows[1]["error"]


def test_generations_and_segments(tmp_path):
    generations = [Generation(row=n, status=Status.OK, text=f"t{n}", token_ids=np.arange(n)) for n in range(40)]
    (tmp_path / "g.h5").write_bytes(encode_generations(generations, "uuid"))
    description = _described(tmp_path / "g.h5", num_rows=40)
    assert (description.kind, description.num_rows) == ("generations", 40)
    assert description.first_rows[1]["text"] == "t1"
    assert "39 in all" in render(description)


def test_a_run_directory(tmp_path):
    (tmp_path / "run.json").write_text('{"uuid": "u", "identity": {"num_rows": 3}}')
    for folder in ("writers", "claims", "segments"):
        (tmp_path / folder).mkdir()
    (tmp_path / "segments" / "seg-a-0.h5").write_bytes(b"")
    (tmp_path / "segments" / ".tmp-x.h5").write_bytes(b"")
    description = _described(tmp_path)
    assert description.kind == "run directory" and description.contents["segments"] == 1
    assert "not complete" in description.note
    (tmp_path / "generations.h5").write_bytes(encode_generations([Generation(row=0, status=Status.OK)], "u"))
    assert _described(tmp_path).num_rows == 1
    (tmp_path / "run.json").write_text("not json")
    with pytest.raises(DataError):
        describe(tmp_path)


def test_any_other_hdf5(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["weights/w0"] = np.zeros((2, 3))
        file.attrs["shape"] = np.arange(3)
        file.attrs["empty"] = h5py.Empty("f8")
    description = _described(tmp_path / "x.h5")
    assert description.kind == "HDF5" and description.columns == {"/weights/w0": "[2, 3] float64"}
    assert "no prompts" in description.note


def test_what_cannot_be_inspected(tmp_path):
    (tmp_path / "text").write_text("no HDF5")
    for path, words in ((tmp_path / "none", "no such file"), (tmp_path / "text", "HDF5"), (tmp_path, "no prompts")):
        with pytest.raises(DataError, match=words):
            describe(path)


def test_a_damaged_file_of_ours_is_an_error(tmp_path):
    with h5py.File(_prompts(tmp_path / "p.h5"), "a") as file:
        del file["prompts/offsets"]
    with pytest.raises(DataError):
        describe(tmp_path / "p.h5")
