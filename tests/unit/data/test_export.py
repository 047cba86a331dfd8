"""Exports: every generation a line, the same keys in each, whole files or none."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import stat

import numpy as np
import pytest

from hpcinfer.data.export import ExportOptions, export, export_jsonl
from hpcinfer.data.generations import encode_generations
from hpcinfer.data.hdf5 import whole_file
from hpcinfer.data.prompts.prompts_writer import PromptsWriter
from hpcinfer.errors import DataError, UsageError
from hpcinfer.request import FinishReason, Generation, Status

GENERATIONS = [
    Generation(row=0, status=Status.OK, finish_reason=FinishReason.STOP, token_ids=np.array([5, 6], np.int32),
               text="42 ü\n", num_prompt_tokens=3),
    Generation(row=0, sample=1, status=Status.OK, finish_reason=FinishReason.LENGTH, text="\u2028 \" \\"),
    Generation(row=2, status=Status.FAILED, error="the prompt is empty"),
]  # fmt: skip


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "generations.h5"
    path.write_bytes(encode_generations(GENERATIONS, "uuid"))
    return path


def _prompts(path, num_rows=3):
    with PromptsWriter(path) as writer:
        for row in range(num_rows):
            writer.append(f"prompt {row}", id=f"id-{row}")
    return path


def _exported(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def test_lines(tmp_path, source):
    summary = export_jsonl(source, tmp_path / "out.jsonl")
    entries = _exported(tmp_path / "out.jsonl")
    assert summary.num_rows == 3 and not summary.complete
    assert [list(entry) for entry in entries] == [list(entries[0])] * 3
    assert entries[0] == {
        "row": 0, "sample": 0, "text": "42 ü\n", "finish_reason": "stop", "status": "ok",
        "num_prompt_tokens": 3, "num_output_tokens": 2, "error": None,
    }  # fmt: skip
    assert entries[1]["text"] == "\u2028 \" \\" and entries[1]["finish_reason"] == "length"
    assert entries[2]["status"] == "failed" and entries[2]["error"] == "the prompt is empty"


def test_ids_prompts_and_token_ids(tmp_path, source):
    options = ExportOptions(prompts=str(_prompts(tmp_path / "p.h5")), prompt_text=True, token_ids=True)
    export_jsonl(source, tmp_path / "out.jsonl", options)
    entries = _exported(tmp_path / "out.jsonl")
    assert [(entry["id"], entry["prompt"]) for entry in entries] == [
        ("id-0", "prompt 0"), ("id-0", "prompt 0"), ("id-2", "prompt 2"),
    ]  # fmt: skip
    assert entries[0]["token_ids"] == [5, 6]


def test_ids_over_many_blocks(tmp_path):
    rows = list(range(0, 40_000, 7))
    source = tmp_path / "g.h5"
    source.write_bytes(encode_generations([Generation(row=row, status=Status.OK) for row in rows], "u"))
    options = ExportOptions(prompts=str(_prompts(tmp_path / "p.h5", 40_000)))
    export_jsonl(source, tmp_path / "out.jsonl", options)
    assert [entry["id"] for entry in _exported(tmp_path / "out.jsonl")] == [f"id-{row}" for row in rows]


def test_a_stream(source):
    stream = io.BytesIO()
    assert export_jsonl(source, stream).num_rows == 3
    assert stream.getvalue().count(b"\n") == 3


def test_a_run_directory(tmp_path, source):
    export_jsonl(tmp_path, tmp_path / "out.jsonl")
    assert len(_exported(tmp_path / "out.jsonl")) == 3
    source.unlink()
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(DataError, match="no generations.h5 yet"):
        export_jsonl(tmp_path, tmp_path / "other.jsonl")


def test_what_cannot_be_exported(tmp_path, source):
    (tmp_path / "there").write_text("precious")
    cases = [
        (source, tmp_path / "there", None, "exists"),
        (source, tmp_path, None, "exists"),
        (source, tmp_path / "no" / "out", None, "cannot write"),
        (tmp_path / "none", tmp_path / "out", None, "no such file"),
        (tmp_path / "there", tmp_path / "out", None, "HDF5"),
        (_prompts(tmp_path / "p.h5"), tmp_path / "out", None, "not a generations file"),
        (source, tmp_path / "out", ExportOptions(prompt_text=True), "need the prompts"),
        (source, tmp_path / "out", ExportOptions(prompts=str(_prompts(tmp_path / "q.h5", 2))), "not of"),
    ]
    for path, destination, options, words in cases:
        with pytest.raises(DataError, match=words):
            export_jsonl(path, destination, options)
    assert sorted(os.listdir(tmp_path)) == ["generations.h5", "p.h5", "q.h5", "there"]
    assert (tmp_path / "there").read_text() == "precious"


def test_a_damaged_source_leaves_no_destination(tmp_path, source):
    content = bytearray(source.read_bytes())
    content[content.index("42 ü".encode()) + 1] ^= 1
    source.write_bytes(content)
    with pytest.raises(DataError):
        export_jsonl(source, tmp_path / "out.jsonl")
    assert os.listdir(tmp_path) == ["generations.h5"]


def test_what_is_not_a_plain_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/"):
        with pytest.raises(DataError, match="not a plain file"), whole_file(path):
            raise AssertionError("nothing may be written")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_an_export_never_replaces_what_it_reads(source, tmp_path):
    before = source.read_bytes()
    (tmp_path / "link").symlink_to(source)
    prompts = _prompts(tmp_path / "prompts.h5")
    for name in ("generations.h5", "link", "prompts.h5"):
        with pytest.raises(DataError, match="would replace what is read"):
            export_jsonl(source, tmp_path / name, ExportOptions(prompts=str(prompts)), overwrite=True)
    assert source.read_bytes() == before


def test_the_two_files_of_an_openai_export_are_two(source, tmp_path):
    options = ExportOptions(format="openai", prompts=str(_prompts(tmp_path / "prompts.h5")), errors=str(tmp_path / "out.jsonl"))
    with pytest.raises(UsageError, match="is DEST too"):
        export(source, tmp_path / "out.jsonl", options)
    with pytest.raises(DataError, match="would replace what is read"):
        export(source, tmp_path / "out.jsonl", dataclasses.replace(options, errors=str(source)), overwrite=True)


def test_a_full_disk_asks_for_space(tmp_path):
    with pytest.raises(DataError, match="free space"), whole_file(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name", ["out.csv.gz", "out.jsonl.zst"])
def test_a_compressed_name_is_no_format(source, tmp_path, name):
    with pytest.raises(UsageError, match="would not be compressed"):
        export(source, tmp_path / name)
    assert not (tmp_path / name).exists()
