"""Exports as tables, joined with the input, and of runs that go on; read back by the tools that people use."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcinfer.data.convert.base import ConvertOptions
from hpcinfer.data.convert.driver import convert
from hpcinfer.data.export import ExportOptions, export
from hpcinfer.data.generations import GenerationFile, encode_generations
from hpcinfer.data.ledger.commit import commit_bytes
from hpcinfer.data.ledger.coverage import segment_name
from hpcinfer.data.ledger.merge import merge_run
from hpcinfer.data.ledger.run_directory import RunIdentity, create_or_open
from hpcinfer.data.ledger.segments import SegmentPolicy, SegmentWriter
from hpcinfer.data.prompts.identity import prefix_fingerprint
from hpcinfer.data.prompts.reader import open_prompts
from hpcinfer.errors import DataError, UsageError
from hpcinfer.request import FinishReason, Generation, Status

GENERATIONS = [
    Generation(row=0, status=Status.OK, finish_reason=FinishReason.STOP, token_ids=np.array([5, 6], np.int32),
               text="42 ü\n", num_prompt_tokens=3),
    Generation(row=0, sample=1, status=Status.OK, finish_reason=FinishReason.LENGTH, text="\u2028 \" \\ , \r\n\x00 NA"),
    Generation(row=1, status=Status.OK, text=""),
    Generation(row=2, status=Status.FAILED, error="the prompt, \"so to say\", is empty"),
]  # fmt: skip
OURS = ["row", "sample", "text", "finish_reason", "status", "num_prompt_tokens", "num_output_tokens", "error"]
LINES = [
    {"prompt": "p, \"0\"", "id": "a", "tag": "x\n", "n_words": 3, "text": "a column named as one of ours", "nested": {"k": [1, None]}},
    {"prompt": "p1", "tag": None, "text": ""},
    {"prompt": "p2", "id": "c", "n_words": 1.5},
]  # fmt: skip


@pytest.fixture
def joined(tmp_path):
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    convert([tmp_path / "in.jsonl"], tmp_path / "p.h5", options=ConvertOptions(meta_columns="all"))
    (tmp_path / "g.h5").write_bytes(encode_generations(GENERATIONS, "uuid"))
    return tmp_path


def everything(folder, **more):
    return ExportOptions(prompts=str(folder / "p.h5"), prompt_text=True, meta_columns="all", token_ids=True, **more)


def test_parquet_read_by_pandas_and_pyarrow(joined):
    pandas, pq = pytest.importorskip("pandas"), pytest.importorskip("pyarrow.parquet")
    summary = export(joined / "g.h5", joined / "out.parquet", everything(joined))
    assert summary.num_rows == 4
    frame = pandas.read_parquet(joined / "out.parquet")
    assert list(frame) == ["id", "prompt", "n_words", "nested", "tag", "meta.text", *OURS, "token_ids"]
    assert frame["text"].tolist() == [one.text for one in GENERATIONS]
    assert frame["row"].tolist() == [0, 0, 1, 2] and str(frame["row"].dtype) == "uint64"
    assert frame["token_ids"][0].tolist() == [5, 6] and frame["id"].tolist()[:2] == ["a", "a"]
    assert frame["prompt"].tolist() == ["p, \"0\"", "p, \"0\"", "p1", "p2"]
    assert frame["meta.text"][0] == "a column named as one of ours"
    assert json.loads(frame["nested"][0]) == {"k": [1, None]} and frame["n_words"][3] == "1.5"
    assert frame["error"].isna().tolist() == [True, True, True, False]
    table = pq.read_table(joined / "out.parquet")
    assert "int32" in str(table.schema.field("token_ids").type) and str(table.schema.field("sample").type) == "uint16"


def test_csv_read_by_pandas_and_by_python(joined):
    export(joined / "g.h5", joined / "out.csv", everything(joined))
    with open(joined / "out.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == [one.text for one in GENERATIONS]
    assert [row["tag"] for row in rows] == ["x\n", "x\n", "", ""] and rows[0]["token_ids"] == "[5, 6]"
    assert rows[3]["error"] == GENERATIONS[3].error and rows[0]["error"] == ""
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(joined / "out.csv", keep_default_na=False, lineterminator=None)
    assert frame["text"].tolist()[0] == "42 ü\n" and frame["row"].tolist() == [0, 0, 1, 2] and list(frame) == list(rows[0])


def test_json_lines_with_columns(joined):
    export(joined / "g.h5", joined / "out.jsonl", everything(joined))
    entries = [json.loads(line) for line in (joined / "out.jsonl").read_bytes().split(b"\n")[:-1]]
    assert all(list(entry) == list(entries[0]) for entry in entries)
    assert entries[0]["nested"] == {"k": [1, None]} and entries[3]["n_words"] == 1.5 and entries[2]["meta.text"] == ""
    export(joined / "g.h5", joined / "two.jsonl", ExportOptions(prompts=str(joined / "p.h5"), meta_columns="tag, n_words"))
    assert list(json.loads((joined / "two.jsonl").read_text().splitlines()[0]))[:3] == ["id", "tag", "n_words"]
    with pytest.raises(DataError, match="no meta column 'tags'.*\n.*nested"):
        export(joined / "g.h5", joined / "three.jsonl", ExportOptions(prompts=str(joined / "p.h5"), meta_columns="tags"))


@pytest.mark.parametrize("format", ["jsonl", "csv", "parquet"])
def test_meta_columns_named_as_ours_and_as_each_other(tmp_path, format):
    meta = {"score": "high", "token_ids": "none", "text": "a", "meta.text": "b", "embedding": True}
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "p", **meta}) + "\n")
    convert([tmp_path / "in.jsonl"], tmp_path / "p.h5", options=ConvertOptions(meta_columns="all"))
    (tmp_path / "g.h5").write_bytes(encode_generations([Generation(row=0, status=Status.OK, text="ours")], "uuid"))
    out = tmp_path / f"out.{format}"
    export(tmp_path / "g.h5", out, ExportOptions(prompts=str(tmp_path / "p.h5"), meta_columns="all"))
    if format == "jsonl":
        found = json.loads(out.read_text())
    elif format == "csv":
        [found] = csv.DictReader(io.StringIO(out.read_text()))
    else:
        [found] = pyarrow.parquet.read_table(out).to_pylist()
    shown = {"score": "high", "token_ids": "none", "text": "ours", "meta.meta.text": "a", "meta.text": "b"}
    assert {name: found[name] for name in shown} == shown and str(found["embedding"]).lower() == "true"


def test_no_rows_at_all(joined):
    (joined / "empty.h5").write_bytes(encode_generations([], "uuid"))
    export(joined / "empty.h5", joined / "out.csv", everything(joined))
    assert (joined / "out.csv").read_text().startswith("id,prompt,n_words,nested,tag,meta.text,row,sample")
    pandas = pytest.importorskip("pandas")
    export(joined / "empty.h5", joined / "out.parquet")
    assert list(pandas.read_parquet(joined / "out.parquet")) == OURS


def test_formats_by_name_and_streams(joined):
    stream = io.BytesIO()
    export(joined / "g.h5", stream, ExportOptions(format="csv"))
    assert stream.getvalue().startswith(b"row,sample,text") and not stream.closed
    with pytest.raises(UsageError, match="stream"):
        export(joined / "g.h5", stream, ExportOptions(format="parquet"))
    with pytest.raises(UsageError, match="no format"):
        export(joined / "g.h5", joined / "out", ExportOptions(format="xlsx"))
    name = "a 'b\" \n[c]*\udcff.parquet"
    pytest.importorskip("pyarrow")
    export(joined / "g.h5", joined / name)
    assert (joined / name).read_bytes()[:4] == b"PAR1"


TEXT = st.text(alphabet=st.sampled_from("\r\n\",\x00\u2028 aü"), max_size=4) | st.text(alphabet=st.characters(codec="utf-8"), max_size=6)
TEXTS = st.lists(TEXT, max_size=6)


@settings(max_examples=50)
@given(texts=TEXTS)
def test_any_text_comes_back(tmp_path_factory, texts):
    pq = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path_factory.mktemp("texts")
    generations = [Generation(row=row, status=Status.OK, text=text) for row, text in enumerate(texts)]
    (folder / "g.h5").write_bytes(encode_generations(generations, "uuid"))
    for name in ("out.csv", "out.parquet", "out.jsonl"):
        export(folder / "g.h5", folder / name)
    with open(folder / "out.csv", newline="", encoding="utf-8") as file:
        assert [row["text"] for row in csv.DictReader(file)] == texts
    assert pq.read_table(folder / "out.parquet")["text"].to_pylist() == texts
    assert [json.loads(line)["text"] for line in (folder / "out.jsonl").read_bytes().split(b"\n")[:-1]] == texts


def new_run(folder, num_rows):
    (folder / "in.txt").write_text("".join(f"prompt {n}\n" for n in range(num_rows)))
    convert([folder / "in.txt"], folder / "p.h5")
    with open_prompts(folder / "p.h5") as reader:
        fingerprint = prefix_fingerprint(reader)
    notes = {"prompts": str(folder / "p.h5"), "model": "somewhere/demo"}
    identity = RunIdentity(input_fingerprint=fingerprint, num_rows=num_rows, model={}, sampling={}, notes=notes)
    return create_or_open(folder / "run", identity)


def made(row, status=Status.OK):
    return Generation(row=row, status=status, text=f"text {row}", token_ids=np.array([row], np.int32))


def test_partial_exports(tmp_path):
    run = new_run(tmp_path, 6)
    with pytest.raises(DataError, match="--partial"):
        export(run.path, tmp_path / "out.jsonl")
    parts = [[made(4), made(1)], [made(1, Status.PARTIAL), made(5, Status.PARTIAL)], []]
    for number, part in enumerate(parts):
        commit_bytes(run.segments, segment_name("a" * 16, number), encode_generations(part, run.uuid))
    summary = export(run.path, tmp_path / "out.jsonl", ExportOptions(partial=True, ids=True, prompt_text=True))
    entries = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert not summary.complete and summary.source == str(run.path)
    assert [(entry["row"], entry["status"], entry["prompt"]) for entry in entries] == [
        (1, "ok", "prompt 1"), (4, "ok", "prompt 4"), (5, "partial", "prompt 5"),
    ]  # fmt: skip
    export(run.path, tmp_path / "batch.jsonl", ExportOptions(partial=True, format="openai"))
    lost = [json.loads(line) for line in (tmp_path / "batch.errors.jsonl").read_text().splitlines()]
    assert [(entry["custom_id"], entry["error"]["code"]) for entry in lost] == [(f"row-{n}", "unfinished") for n in (0, 2, 3, 5)]
    response = json.loads((tmp_path / "batch.jsonl").read_text().splitlines()[0])["response"]["body"]
    assert response["model"] == "demo" and response["created"] > 1_600_000_000
    # Nothing is left behind, in the run directory least of all.
    assert sorted(os.listdir(run.path)) == ["claims", "logs", "run.json", "segments", "writers"]
    assert sorted(os.listdir(tmp_path)) == ["batch.errors.jsonl", "batch.jsonl", "in.txt", "out.jsonl", "p.h5", "run"]
    # A complete run is exported as it is.
    commit_bytes(run.segments, segment_name("b" * 16, 0), encode_generations([made(n) for n in (0, 2, 3, 5)], run.uuid))
    merge_run(run, 6)
    assert export(run.path, tmp_path / "all.jsonl", ExportOptions(partial=True)).complete


def test_the_prompts_must_be_those_of_the_run(tmp_path):
    run = new_run(tmp_path, 3)
    commit_bytes(run.segments, segment_name("a" * 16, 0), encode_generations([made(n) for n in range(3)], run.uuid))
    merge_run(run, 3)
    (tmp_path / "in.txt").write_text("other 0\nother 1\nother 2\n")
    convert([tmp_path / "in.txt"], tmp_path / "other.h5")
    for source in (run.path, run.path / "generations.h5"):
        with pytest.raises(DataError, match="not of"):
            export(source, tmp_path / "out.jsonl", ExportOptions(prompts=str(tmp_path / "other.h5")))
        assert export(source, tmp_path / "out.jsonl", ExportOptions(ids=True), overwrite=True).num_rows == 3
    # Rows that were appended to the input do no harm.
    (tmp_path / "in.txt").write_text("".join(f"prompt {n}\n" for n in range(5)))
    convert([tmp_path / "in.txt"], tmp_path / "p.h5", overwrite=True)
    assert export(run.path, tmp_path / "out.jsonl", ExportOptions(ids=True), overwrite=True).num_rows == 3


def test_partial_exports_while_writers_write_and_compact(tmp_path):
    num_rows, num_writers = 450, 3
    run = new_run(tmp_path, num_rows)
    committed: list[int] = []
    exports: list[int] = []
    compactions = [0] * num_writers

    def write(number: int) -> None:
        policy = SegmentPolicy(max_rows=5, max_segments=4)
        writer = SegmentWriter(run, f"{number}" * 16, policy)
        for row in range(number, num_rows, num_writers):
            writer.add([made(row)])
            if row % 5 == 0:
                writer.flush()
                committed.append(row)
                # Not ready before it was seen half done, twice.
                while len(exports) < 2 * row // num_rows:
                    time.sleep(0.001)
        writer.flush()
        compactions[number] = writer._store.num_compactions
        writer.close()

    threads = [threading.Thread(target=write, args=(number,), daemon=True) for number in range(num_writers)]
    for thread in threads:
        thread.start()
    known: set[int] = set()
    while True:
        running = any(thread.is_alive() for thread in threads)
        safe = set(committed)
        export(run.path, tmp_path / "out.jsonl", ExportOptions(partial=True), overwrite=True)
        entries = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        rows = [entry["row"] for entry in entries]
        assert rows == sorted(set(rows)) and known | safe <= set(rows)
        assert all(entry["text"] == f"text {entry['row']}" for entry in entries)
        if len(known) < len(rows) < num_rows:
            exports.append(len(rows))
        known = set(rows)
        if not running:
            break
    assert known == set(range(num_rows)) and len(exports) >= 1 and sum(compactions) > 5
    assert not [name for name in os.listdir(run.segments) if name.endswith(".bad")]


def test_h5dump_reads_our_files(joined):
    h5dump = shutil.which("h5dump")
    if h5dump is None:
        pytest.skip("h5dump is not installed (apt-get install hdf5-tools)")
    for name in ("p.h5", "g.h5"):
        dumped = subprocess.run([h5dump, joined / name], capture_output=True, text=True, check=True)
        assert "error" not in dumped.stderr.lower()
        with h5py.File(joined / name) as file:
            file.visititems(lambda path, item: _is_in(path, item, dumped.stdout))


def _is_in(path, item, dump):
    name = re.escape(path.rsplit("/", 1)[-1])
    assert re.search(rf'(DATASET|GROUP) "{name}"', dump), path
    if isinstance(item, h5py.Dataset) and 0 < item.size < 4:
        values = ", ".join(map(str, item[:].tolist()))
        assert f"(0): {values}" in dump, path


def test_h5py_alone_reads_our_files(joined):
    """As datasets/PROMPTS.md and GENERATIONS.md describe them, without a line of ours."""
    with h5py.File(joined / "p.h5") as file:
        assert (file.attrs["format"], file.attrs["version"], file.attrs["n_rows"]) == ("hpcinfer-prompts", 1, 3)

        def texts(group):
            data, offsets = group["data"][:].tobytes(), group["offsets"][:]
            return [data[a:b].decode() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]

        assert texts(file["prompts"]) == [line["prompt"] for line in LINES]
        assert texts(file["id"]) == ["a", "", "c"]
        assert [json.loads(text) if text else None for text in texts(file["meta/n_words"])] == [3, None, 1.5]
    with h5py.File(joined / "g.h5") as file:
        group = file["generations"]
        offsets = group["text_offsets"][:]
        found = [group["text"][a:b].tobytes().decode() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
        assert found == [one.text for one in GENERATIONS]
        names = {value: name for name, value in json.loads(group["status"].attrs["enum"]).items()}
        assert [names[value] for value in group["status"][:].tolist()] == ["ok", "ok", "ok", "failed"]
    with GenerationFile(Path(joined / "g.h5")) as file:
        assert len(file) == 4
