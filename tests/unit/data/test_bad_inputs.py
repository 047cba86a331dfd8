"""Ten kinds of bad input for every format that is read: a clear error or one lost row, never a traceback, never a lost good row."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcinfer.cli.main import main
from hpcinfer.data.convert import driver  # noqa: F401 - importing it registers the converters
from hpcinfer.data.convert.base import CONVERTERS
from hpcinfer.data.prompts.prompts_writer import PromptsWriter
from hpcinfer.data.prompts.reader import open_prompts
from hpcinfer.errors import HpcinferError
from tests.conftest import ROOT

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

LONG = 100_000_000
FORMATS = {"jsonl": "in.jsonl", "csv": "in.csv", "text": "in.txt", "openai": "batch.jsonl", "parquet": "in.parquet", "hdf5": "in.h5"}
NAN = b', "temperature": NaN'
GOOD = ["good 0", "good 1", "good 2"]


def jsonl_line(prompt=b'"x"', more=b""):
    return b'{"prompt": ' + prompt + more + b"}"


def openai_line(prompt=b'"x"', more=b"", name=b"bad"):
    return b'{"custom_id": "%b", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": %b%b}}' % (name, prompt, more)


def lines_of(kind, bad):
    """A file with `bad` between good lines."""
    good = [prompt.encode() for prompt in GOOD]
    if kind == "jsonl":
        good = [jsonl_line(b'"%b"' % prompt) for prompt in good]
    elif kind == "openai":
        good = [openai_line(b'"%b"' % prompt, name=prompt) for prompt in good]
    elif kind == "csv":
        good = [b"%b,1" % prompt for prompt in good]
    head = [b"prompt,temperature"] if kind == "csv" else []
    return b"\n".join([*head, good[0], bad, good[1], good[2], b""])


def parquet_of(path, prompts, temperatures=None):
    columns = {"prompt": prompts}
    if temperatures is not None:
        columns["temperature"] = pa.array(temperatures, pa.float64())
    pq.write_table(pa.table(columns), path)


def unchecked(values):
    raw = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())


def hdf5_of(path, prompts, **columns):
    with h5py.File(path, "w") as file:
        file["prompts/data"] = np.frombuffer(b"".join(prompts), np.uint8)
        file["prompts/offsets"] = np.cumsum([0] + [len(prompt) for prompt in prompts])
        for name, values in columns.items():
            file[name] = values


BYTES = [GOOD[0].encode(), b"bad", GOOD[1].encode(), GOOD[2].encode()]


def plant(kind, fault, path):
    """Writes a file of this kind with this fault in its second row."""
    if kind == "parquet":
        texts = [one.decode() for one in BYTES]
        if fault == "wrong type":
            pq.write_table(pa.table({"prompt": pa.array([texts[0], None, *texts[2:]])}), path)
        elif fault == "NaN":
            parquet_of(path, texts, [1.0, float("nan"), 1.0, 1.0])
        elif fault == "invalid UTF-8":
            parquet_of(path, unchecked([BYTES[0], b"\xff\xfe", *BYTES[2:]]))
        elif fault == "100 MB":
            parquet_of(path, [texts[0], "x" * LONG, *texts[2:]])
    elif kind == "hdf5":
        if fault == "wrong type":
            hdf5_of(path, BYTES, seed=np.array([1.0, 1.5, 1.0, 1.0]))
        elif fault == "NaN":
            hdf5_of(path, BYTES, temperature=np.array([1.0, np.nan, 1.0, 1.0]))
        elif fault == "invalid UTF-8":
            hdf5_of(path, [BYTES[0], b"\xff\xfe", *BYTES[2:]])
        elif fault == "100 MB":
            hdf5_of(path, [BYTES[0], b"x" * LONG, *BYTES[2:]])
        elif fault == "offsets":
            hdf5_of(path, BYTES)
            with h5py.File(path, "r+") as file:
                # Only the row between the two offsets can be hurt: its end lies before its start.
                data = b"".join(BYTES)
                del file["prompts/data"]
                file["prompts/data"] = np.frombuffer(data + b"tail", np.uint8)
                offsets = file["prompts/offsets"][:]
                file["prompts/offsets"][...] = [offsets[0], offsets[1], -5, offsets[3], offsets[4]]
    else:
        bad = {
            "wrong type": {"jsonl": jsonl_line(b"7"), "openai": openai_line(b"7"), "csv": b"one field", "text": b""},
            "NaN": {"jsonl": jsonl_line(more=NAN), "openai": openai_line(more=NAN), "csv": b"x,NaN"},
            "invalid UTF-8": {"jsonl": jsonl_line(b'"\xff"'), "openai": openai_line(b'"\xff"'), "csv": b"\xff,1", "text": b"\xff"},
            "100 MB": dict.fromkeys(FORMATS, b"x" * LONG),
        }[fault][kind]
        path.write_bytes(lines_of(kind, bad))


def converted(kind, source, destination, capsys):
    """The exit code of `hpcinfer convert` and what it said; anything but our errors would come out of main as it is."""
    capsys.readouterr()
    code = main(["convert", str(source), str(destination), "--format", kind, "--overwrite"])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return code, said


def good_ones(path):
    with open_prompts(path) as reader:
        return [row.text for row in reader.rows()]


ISOLATED = [
    # 100 MB take a second each; for JSON Lines tests/unit/data/test_convert.py has them every time.
    pytest.param(kind, fault, marks=[pytest.mark.full] if fault == "100 MB" else [])
    for kind in FORMATS for fault in ("wrong type", "NaN", "invalid UTF-8", "100 MB", "offsets")
    if not (kind == "text" and fault == "NaN") and not (kind != "hdf5" and fault == "offsets")
]  # fmt: skip


@pytest.mark.parametrize(("kind", "fault"), ISOLATED)
def test_a_bad_row_is_lost_alone(tmp_path, capsys, kind, fault):
    source = tmp_path / FORMATS[kind]
    plant(kind, fault, source)
    code, said = converted(kind, source, tmp_path / "out.h5", capsys)
    assert code == 0 and said.startswith("rejected ")
    lost = [json.loads(line) for line in (tmp_path / "out.h5.rejected.jsonl").read_text().splitlines()]
    # A negative offset is the end of one row and the start of the next one.
    expected = GOOD if fault != "offsets" else [GOOD[0], GOOD[2]]
    assert good_ones(tmp_path / "out.h5") == expected and len(lost) == 4 - len(expected)
    assert all(entry["reason"] for entry in lost)


def whole(kind, path):
    """A good file."""
    if kind == "parquet":
        parquet_of(path, GOOD)
    elif kind == "hdf5":
        with PromptsWriter(path) as writer:
            for prompt in GOOD:
                writer.append(prompt)
    else:
        path.write_bytes(lines_of(kind, b"").replace(b"\n\n", b"\n"))


@contextlib.contextmanager
def as_nobody():
    """Modes say nothing to root."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def refused(kind, source, destination, capsys, *words):
    code, said = converted(kind, source, destination, capsys)
    assert code == 1 and "hpcinfer: " in said, said
    assert all(word in said for word in (*words, source.name)), said
    assert not destination.exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_files_that_cannot_be_read_at_all(tmp_path, capsys, kind):
    source, destination = tmp_path / FORMATS[kind], tmp_path / "out.h5"
    whole(kind, source)
    assert converted(kind, source, destination, capsys)[0] == 0 and good_ones(destination) == GOOD
    destination.unlink()
    source.write_bytes(b"")
    code, said = converted(kind, source, destination, capsys)
    assert code == 1 and ("empty" in said or "no good prompt" in said)
    source.unlink()
    source.mkdir()
    refused(kind, source, destination, capsys, "no prompts in the folder" if kind == "hdf5" else "is a folder")
    shutil.rmtree(source)
    refused(kind, source, destination, capsys, "no such file")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", FORMATS)
def test_no_permission(capsys, kind):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        source, destination = Path(folder) / FORMATS[kind], Path(folder) / "out.h5"
        whole(kind, source)
        source.chmod(0)
        with as_nobody():
            refused(kind, source, destination, capsys, "Permission denied")
        source.chmod(0o600)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_changes_while_it_is_read(tmp_path, capsys, monkeypatch, kind):
    source = tmp_path / FORMATS[kind]
    whole(kind, source)
    records = CONVERTERS[kind].records

    def meanwhile(self, path):
        for number, item in enumerate(records(self, path)):
            yield item
            if number == 0:
                with open(path, "ab") as file:
                    file.write(b"\n")

    monkeypatch.setattr(CONVERTERS[kind], "records", meanwhile)
    refused(kind, source, tmp_path / "out.h5", capsys, "changed while it was read")


@pytest.mark.parametrize("kind", ["parquet", "hdf5"])
def test_truncated_at_every_tenth(tmp_path, capsys, kind):
    source = tmp_path / FORMATS[kind]
    whole(kind, source)
    content = source.read_bytes()
    for tenth in range(1, 10):
        source.write_bytes(content[: len(content) * tenth // 10])
        refused(kind, source, tmp_path / "out.h5", capsys)


def test_an_hdf5_file_that_shrinks_under_its_reader(tmp_path):
    """The kernel's own reads come back short; rows that were read are right, and the rest is an error of ours."""
    path = tmp_path / "p.h5"
    with PromptsWriter(path) as writer:
        for number in range(200_000):
            writer.append(f"the prompt with the number {number}")
    with open_prompts(path) as reader:
        rows = reader.rows()
        first = [next(rows) for _ in range(10)]
        os.truncate(path, os.stat(path).st_size // 3)
        with pytest.raises(HpcinferError, match="cut short"):
            for row in rows:
                assert row.text == f"the prompt with the number {row.row}"
    assert [row.text for row in first] == [f"the prompt with the number {number}" for number in range(10)]


@pytest.mark.parametrize("kind", ["parquet", "hdf5"])
def test_columns_of_the_wrong_type(tmp_path, capsys, kind):
    source = tmp_path / FORMATS[kind]
    if kind == "parquet":
        parquet_of(source, [1.5, 2.5])
    else:
        with h5py.File(source, "w") as file:
            file["prompts/data"] = np.ones(5)
            file["prompts/offsets"] = [0, 2, 5]
    code, said = converted(kind, source, tmp_path / "out.h5", capsys)
    assert code == 1 and ("neither text nor" in said or "float64" in said)


def test_names_with_quotes_spaces_and_newlines(tmp_path, capsys):
    for kind, name in FORMATS.items():
        folder = tmp_path / f"a 'b\" \n[c]* $HOME {kind}"
        folder.mkdir()
        source = folder / f"'\" \n*[{name}"
        whole(kind, source)
        destination = folder / "out 'put\"\n[0].h5"
        assert converted(kind, source, destination, capsys)[0] == 0
        assert good_ones(destination) == GOOD


def test_no_reader_can_run_what_it_reads():
    """What turns data into code or into objects of any kind is not even imported by what reads users' files."""
    forbidden = {"pickle", "marshal", "shelve", "dill", "yaml", "subprocess", "eval", "exec", "__import__", "allow_pickle"}
    for folder in ("data", "config"):
        for path in (ROOT / "hpcinfer" / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
                names += [node.id] if isinstance(node, ast.Name) else []
                names += [node.arg or ""] if isinstance(node, ast.keyword) else []
                assert not forbidden & {part for name in names for part in name.split(".")}, path


def test_the_table_has_every_format():
    assert set(FORMATS) == set(CONVERTERS)
