"""Converters: good lines kept, bad ones explained, whatever the bytes are."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hpcinfer.data.convert.base import ConvertOptions
from hpcinfer.data.convert.driver import convert
from hpcinfer.data.prompts.reader import open_prompts, sampling_for
from hpcinfer.errors import DataError, HpcinferError, UsageError
from hpcinfer.request import SamplingParams


def run(tmp_path, content, name="in.jsonl", **settings):
    source = tmp_path / name
    source.write_bytes(content if isinstance(content, bytes) else content.encode())
    options = ConvertOptions(**{k: v for k, v in settings.items() if k in ConvertOptions.__dataclass_fields__})
    rest = {k: v for k, v in settings.items() if k not in ConvertOptions.__dataclass_fields__}
    summary = convert([source], tmp_path / "out.h5", options=options, **rest)
    with open_prompts(summary.destination) as reader:
        rows, ids = list(reader.rows()), list(reader.ids())
    return summary, rows, ids


def rejects(tmp_path):
    path = tmp_path / "out.h5.rejected.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_json_lines(tmp_path):
    content = (
        '{"prompt": "one", "id": "a", "max_tokens": 5, "temperature": 0.5}\n'
        "\n"
        '{"prompt": "zwei ü \\ud83d\\ude42", "id": 17, "seed": null, "stop_token_ids": [1, 2]}\r\n'
        '{"prompt": "last, without an end of line"}'
    )
    summary, rows, ids = run(tmp_path, content)
    assert (summary.num_rows, summary.num_rejected, summary.kind, summary.reject_file) == (3, 0, "text", "")
    assert [row.text for row in rows] == ["one", "zwei ü 🙂", "last, without an end of line"]
    assert ids == ["a", "17", None]
    assert sampling_for(rows[0], SamplingParams()) == SamplingParams(max_tokens=5, temperature=0.5)
    assert sampling_for(rows[1], SamplingParams()) == SamplingParams(stop_token_ids=(1, 2))
    assert not (tmp_path / "out.h5.rejected.jsonl").exists()


def test_json_lines_with_every_kind_of_sampling(tmp_path):
    content = (
        '{"prompt": "one", "stop": "END", "bad_words": ["x y"], "logit_bias": {"7": -100, "3": 1.5}, "presence_penalty": 1}\n'
        '{"prompt": "two", "stop": null, "bad_words": null, "logit_bias": null, "repetition_penalty": null}\n'
        '{"prompt": "three", "stop": ["a", "é"], "include_stop_str_in_output": true, "min_tokens": 200, "logit_bias": {}}\n'
    )
    summary, rows, _ = run(tmp_path, content)
    assert (summary.num_rows, summary.num_rejected) == (3, 0)
    job = SamplingParams(max_tokens=300, stop="of the job", repetition_penalty=1.5, logit_bias={1: 2.0})
    assert sampling_for(rows[0], job) == dataclasses.replace(
        job, stop=("END",), bad_words=("x y",), logit_bias={3: 1.5, 7: -100.0}, presence_penalty=1.0
    )
    assert sampling_for(rows[1], job) == job
    assert sampling_for(rows[2], job) == dataclasses.replace(
        job, stop=("a", "é"), include_stop_str_in_output=True, min_tokens=200, logit_bias={}
    )


BAD_LINES = [
    ("not json", "not valid JSON"),
    ('{"prompt": "x"', "not valid JSON"),
    ("[1]", "not a JSON object"),
    ("3", "not a JSON object"),
    ('{"text": "x"}', "no column 'prompt'"),
    ('{"prompt": null}', "column 'prompt' is null"),
    ('{"prompt": ""}', "empty"),
    ('{"prompt": 7}', "neither text nor"),
    ('{"prompt": {"a": 1}}', "neither text nor"),
    ('{"prompt": [1, 2]}', "token ids in a file of text"),
    ('{"prompt": [true]}', "token id True"),
    ('{"prompt": "lone \\ud800"}', "surrogates"),
    ('{"prompt": "x", "temperature": NaN}', "NaN"),
    ('{"prompt": "x", "temperature": -1}', "temperature"),
    ('{"prompt": "x", "temperature": 1e999}', "temperature"),
    ('{"prompt": "x", "max_tokens": "many"}', "max_tokens"),
    ('{"prompt": "x", "max_tokens": 0}', "max_tokens"),
    ('{"prompt": "x", "seed": 99999999999999999999}', "seed"),
    ('{"prompt": "x", "stop_token_ids": "12"}', "stop_token_ids"),
    ('{"prompt": "x", "stop": [""]}', "stop"),
    ('{"prompt": "x", "stop": ["lone \\ud800"]}', "surrogates"),
    ('{"prompt": "x", "bad_words": [1]}', "bad_words"),
    ('{"prompt": "x", "logit_bias": {"-1": 1}}', "logit_bias"),
    ('{"prompt": "x", "logit_bias": {"1": "much"}}', "logit_bias"),
    ('{"prompt": "x", "repetition_penalty": 0}', "repetition_penalty"),
    ('{"prompt": "x", "n": ' + "9" * 5000 + "}", "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    (b'{"prompt": "\xff"}', "not valid UTF-8"),
    ('{"prompt": "' + "x" * 2000 + '"}', "none: this one is good"),
]


def test_bad_lines_are_explained_and_the_good_ones_kept(tmp_path):
    lines = ['{"prompt": "first"}']
    for number, (line, _) in enumerate(BAD_LINES):
        lines += [line, f'{{"prompt": "good {number}"}}']
    content = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    seen = []
    # 100,000 brackets need room; that of 2,000 letters is good here.
    summary, rows, _ = run(tmp_path, content, on_reject=seen.append, max_line_bytes=200_000)
    good = [f"good {n}" for n in range(len(BAD_LINES))]
    assert [row.text for row in rows] == ["first", *good[:-1], "x" * 2000, good[-1]]
    found = rejects(tmp_path)
    assert [entry["line"] for entry in found] == list(range(2, 2 * len(BAD_LINES), 2))
    for entry, (line, words) in zip(found, BAD_LINES[:-1], strict=True):
        assert words in entry["reason"], line
        assert len(entry["raw"]) <= 4000
    assert seen == summary.first_rejects and len(seen) == 5
    assert seen[0].endswith("in.jsonl:2: not valid JSON: Expecting value: line 1 column 1 (char 0)")


def test_lines_longer_than_the_limit(tmp_path):
    long = '{"prompt": "' + "x" * 3_000_000 + '"}'
    content = f'{{"prompt": "a"}}\n{long}\n{{"prompt": "b"}}\n{long}'
    summary, rows, _ = run(tmp_path, content, max_line_bytes=1000)
    assert [row.text for row in rows] == ["a", "b"]
    assert [(entry["line"], entry["raw"]) for entry in rejects(tmp_path)] == [(2, ""), (4, "")]


@pytest.mark.parametrize("length", [999, 1000, 1001])
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_the_limit_is_exact(tmp_path, length, end):
    summary, rows, _ = run(tmp_path, "a\n" + "x" * length + end, "in.txt", max_line_bytes=1000)
    assert [len(row.text) for row in rows] == ([1, length] if length <= 1000 else [1])


def test_columns(tmp_path):
    line = {"question": "q", "key": "k", "n": 2, "seed": 3, "top": {"a": [1]}, "a/b": "c"}
    settings = {"prompt_column": "question", "id_column": "key", "meta_columns": "all"}
    summary, rows, ids = run(tmp_path, json.dumps(line), sampling_columns="seed", **settings)
    assert ids == ["k"] and dict(rows[0].overrides) == {"seed": 3}
    with h5py.File(summary.destination) as file:
        stored = {name: bytes(group["data"][:]).decode() for name, group in file["meta"].items()}
    assert stored == {"n": "2", "top": '{"a":[1]}', "a%2Fb": '"c"'}
    settings = {"prompt_column": "question", "sampling_columns": "none"}
    summary, rows, _ = run(tmp_path, json.dumps(line), overwrite=True, **settings)
    assert dict(rows[0].overrides) == {}
    with pytest.raises(UsageError, match="no sampling column"):
        run(tmp_path, json.dumps(line), overwrite=True, sampling_columns="sede")


def test_a_named_id_column_is_required(tmp_path):
    run(tmp_path, '{"prompt": "a", "key": "k"}\n{"prompt": "b"}', id_column="key")
    assert "no id column 'key'" in rejects(tmp_path)[0]["reason"]


def test_token_ids(tmp_path):
    summary, rows, _ = run(tmp_path, '{"prompt": [1, 2147483647]}\n{"prompt": "x"}\n{"prompt": [-1]}\n{"prompt": []}')
    assert summary.kind == "token_ids"
    assert [row.token_ids.tolist() for row in rows] == [[1, 2**31 - 1]]
    assert [entry["line"] for entry in rejects(tmp_path)] == [2, 3, 4]


def test_plain_text(tmp_path):
    summary, rows, _ = run(tmp_path, b"\xef\xbb\xbfone\r\n  two \n\n\xff\nthree", "in.txt")
    assert [row.text for row in rows] == ["one", "  two ", "three"]
    assert [entry["line"] for entry in rejects(tmp_path)] == [3, 4]


def test_gzip(tmp_path):
    content = gzip.compress(b'{"prompt": "a"}\n{"prompt": "b"}\n')
    assert [row.text for row in run(tmp_path, content, "in.jsonl.gz")[1]] == ["a", "b"]
    with pytest.raises(DataError, match="breaks off"):
        run(tmp_path, content[:-12], "in.jsonl.gz", overwrite=True)


def test_foreign_hdf5(tmp_path):
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file.create_dataset("text", data=[b"a", b"\xff", b"c"], dtype=h5py.string_dtype())
        file.create_dataset("other", data=[b"o"], dtype=h5py.string_dtype())
    summary = convert([tmp_path / "in.h5"], tmp_path / "out.h5", options=ConvertOptions(dataset="text"))
    assert (summary.num_rows, summary.num_rejected) == (2, 1)
    assert rejects(tmp_path)[0]["row"] == 1
    assert summary.first_rejects[0].startswith(f"{tmp_path}/in.h5 row 1: ")


def test_padded_shards(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(3):
        with h5py.File(tmp_path / "in" / f"data-0000{number}.h5", "w") as file:
            file["input_ids"] = np.full((2, 3), number)
            file["attention_mask"] = np.array([[1, 1, 0], [1, 1, 1]])
    summary = convert([tmp_path / "in"], tmp_path / "out.h5")
    with open_prompts(summary.destination) as reader:
        assert [row.token_ids.tolist() for row in reader.rows()] == [[0, 0], [0] * 3, [1, 1], [1] * 3, [2, 2], [2] * 3]


def test_our_own_file_keeps_ids_and_sampling(tmp_path):
    run(tmp_path, '{"prompt": "a", "id": "i", "seed": 4}')
    summary = convert([tmp_path / "out.h5"], tmp_path / "again.h5")
    with open_prompts(summary.destination) as again, open_prompts(tmp_path / "out.h5") as first:
        assert list(again.rows()) == list(first.rows()) and list(again.ids()) == ["i"]
        assert again.fingerprint_of(1) == first.fingerprint_of(1)


def test_several_sources_and_globs(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(f"{name}1\n{name}2\n")
    summary = convert([tmp_path / "b.txt", f"{tmp_path}/?.txt"], tmp_path / "out.h5")
    with open_prompts(summary.destination) as reader:
        assert [row.text for row in reader.rows()] == ["b1", "b2", "a1", "a2", "b1", "b2"]


def test_nothing_good_means_no_destination(tmp_path):
    for content in ("", "\n\n", "bad\nworse\n"):
        with pytest.raises(DataError, match="no good prompt"):
            run(tmp_path, content)
        assert not (tmp_path / "out.h5").exists()
    assert len(rejects(tmp_path)) == 2
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.h5.rejected.jsonl"]


def test_too_many_rejects(tmp_path):
    content = '{"prompt": "a"}\nbad\nbad\n'
    with pytest.raises(DataError, match="2 lines rejected, 1 allowed"):
        run(tmp_path, content, max_rejected=lambda total: total // 3)
    assert not (tmp_path / "out.h5").exists()
    assert run(tmp_path, content, max_rejected=lambda total: 2)[0].num_rows == 1


def test_an_existing_destination_is_kept(tmp_path):
    (tmp_path / "out.h5").write_text("precious")
    with pytest.raises(DataError, match="exists"):
        run(tmp_path, '{"prompt": "a"}')
    assert (tmp_path / "out.h5").read_text() == "precious"
    with pytest.raises(DataError, match="no good prompt"):
        run(tmp_path, "bad", overwrite=True)
    assert (tmp_path / "out.h5").read_text() == "precious"
    run(tmp_path, '{"prompt": "a"}', overwrite=True)


def test_an_old_reject_file_goes(tmp_path):
    run(tmp_path, '{"prompt": "a"}\nbad')
    assert rejects(tmp_path)
    run(tmp_path, '{"prompt": "a"}', overwrite=True)
    assert not rejects(tmp_path)


def test_sources_that_cannot_be_read(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="no such file"):
        convert([tmp_path / "none.jsonl"], tmp_path / "out.h5")
    with pytest.raises(DataError, match="folder"):
        convert([tmp_path / "folder.jsonl"], tmp_path / "out.h5", format="jsonl")
    with pytest.raises(UsageError, match="no format"):
        convert([tmp_path / "folder.jsonl"], tmp_path / "out.h5", format="parkett")
    (tmp_path / "data.xyz").write_text("x")
    with pytest.raises(UsageError, match="--format"):
        convert([tmp_path / "data.xyz"], tmp_path / "out.h5")
    with pytest.raises(DataError, match="is a folder"):
        convert([tmp_path / "data.xyz"], tmp_path / "folder.jsonl", format="text")
    with pytest.raises(DataError, match="cannot write"):
        convert([tmp_path / "data.xyz"], tmp_path / "no" / "out.h5", format="text")


def test_names_with_quotes_spaces_and_newlines(tmp_path):
    name = "a 'b\" \n[c]*\udcff.jsonl"
    (tmp_path / name).write_text('{"prompt": "a"}\nbad\n')
    summary = convert([tmp_path / name], tmp_path / f"{name}.h5")
    assert (summary.num_rows, summary.num_rejected) == (1, 1)


LINES = st.one_of(
    st.binary(max_size=60).map(lambda b: b.replace(b"\n", b"")),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["prompt", "id", "max_tokens", "temperature", "seed", "stop_token_ids", "ignore_eos", ""]),
            inner,
            max_size=5,
        ),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode()),
)


@given(lines=st.lists(LINES, max_size=8), name=st.sampled_from(["in.jsonl", "in.txt", "in.jsonl.gz"]))
@example(lines=[b"\x1f\x8b\x08 not gzip"], name="in.jsonl")
@example(lines=[b"\x1f\x8b"], name="in.txt")
def test_any_bytes_give_rows_or_our_errors(tmp_path_factory, lines, name):
    tmp_path = tmp_path_factory.mktemp("fuzz")
    good = b"good" if name == "in.txt" else b'{"prompt": "good"}'
    summary, rows, _ = run(tmp_path, b"\n".join([good, *lines, good]), name, meta_columns="all")
    assert rows[0].text == "good" and rows[-1].text == "good"
    assert all(row.error is None for row in rows)
    assert summary.num_rejected == len(rejects(tmp_path))
    assert summary.num_rows == len(rows)


@given(content=st.binary(max_size=200))
@example(content=b"\x1f\x8b\x08 not gzip")
@example(content=b"\x89HDF\r\n\x1a\n" + b"\0" * 100)
def test_any_file_as_any_format(tmp_path_factory, content):
    tmp_path = tmp_path_factory.mktemp("fuzz")
    for name in ("in.jsonl", "in.txt", "in.h5"):
        try:
            run(tmp_path, content, name, overwrite=True)
        except HpcinferError:
            continue


_MEASURE = """
import json, sys
from hpcinfer.data.convert.driver import convert
def peak_mib():
    # Not getrusage: its peak is inherited from the process that started this one.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
before = peak_mib()
summary = convert([sys.argv[1]], sys.argv[2])
print(json.dumps({"growth_mib": peak_mib() - before, "rows": summary.num_rows, "rejected": summary.num_rejected}))
"""


def _measured(source, destination):
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE, source, destination], capture_output=True, text=True, check=True
    )
    return json.loads(result.stdout)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
@pytest.mark.parametrize("size_kib", [100, 1000, 2000, 3000])
def test_a_full_disk(tmp_path, size_kib):
    source, small = tmp_path / "in.jsonl", tmp_path / "small"
    lines = (json.dumps({"prompt": f"{n} " * 20, "seed": n, "id": str(n)}) for n in range(40_000))
    source.write_text("\n".join(lines))
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", small], check=False)
    if mounted.returncode:
        pytest.skip("mount is not allowed here")
    try:
        command = [sys.executable, "-m", "hpcinfer", "convert", source, small / "out.h5"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        left = os.listdir(small)
    finally:
        subprocess.run(["umount", small], check=True)
    # h5py left alone ends here by SIGSEGV (data/hdf5_output.py).
    assert result.returncode == 1, result.stderr
    assert "No space left on device" in result.stderr and "Traceback" not in result.stderr
    assert left == []


@pytest.mark.full
def test_memory_is_flat_on_300_mb(tmp_path):
    source = tmp_path / "in.jsonl"
    line = json.dumps({"prompt": "word " * 50, "max_tokens": 7, "id": "x" * 10}) + "\n"
    num_rows = 300_000_000 // len(line)
    with open(source, "w") as file:
        for _ in range(num_rows // 1000):
            file.write(line * 1000)
    measured = _measured(source, tmp_path / "out.h5")
    print(measured)
    assert measured["rows"] == num_rows // 1000 * 1000
    assert measured["growth_mib"] < 250


def test_memory_is_flat_on_one_line_of_100_mb(tmp_path):
    source = tmp_path / "in.jsonl"
    with open(source, "w") as file:
        file.write('{"prompt": "a"}\n{"prompt": "')
        for _ in range(100):
            file.write("x" * 1_000_000)
        file.write('"}\n{"prompt": "b"}\n')
    measured = _measured(source, tmp_path / "out.h5")
    assert (measured["rows"], measured["rejected"]) == (2, 1)
    assert measured["growth_mib"] < 250


def test_a_conversion_never_replaces_what_it_reads(tmp_path):
    line = '{"prompt": "one"}\n'
    for name, destination in (("in.jsonl", "in.jsonl"), ("out.h5.rejected.jsonl", "out.h5")):
        (tmp_path / name).write_text(line)
        with pytest.raises(DataError, match="would replace what is read"):
            convert([tmp_path / name], tmp_path / destination, overwrite=True)
        assert (tmp_path / name).read_text() == line
    shards = tmp_path / "shards"
    shards.mkdir()
    convert([tmp_path / "in.jsonl"], shards / "part.h5")
    before = (shards / "part.h5").read_bytes()
    with pytest.raises(DataError, match="would replace what is read"):
        convert([shards], shards / "part.h5", overwrite=True)
    assert (shards / "part.h5").read_bytes() == before


@pytest.mark.parametrize(("content", "problem"), [
    ('[\n {"prompt": "a"},\n {"prompt": "b"}\n]\n', "is a JSON array"),
    ('\n[{"prompt": "a"}, {"prompt": "b"}]', "is a JSON array"),
    ('{"prompt": "a"}\n'.encode("utf-16"), "is UTF-16"),
    ("", "no good prompt in the source\n  found: it is empty"),
])  # fmt: skip
def test_whole_files_of_another_kind(tmp_path, content, problem):
    """None of them loses some rows and keeps others."""
    with pytest.raises(DataError, match=problem):
        run(tmp_path, content)
    assert not (tmp_path / "out.h5").exists()


def test_an_array_among_lines_is_one_bad_line(tmp_path):
    summary, rows, _ = run(tmp_path, '[1]\n{"prompt": "a"}\n[{"prompt": "b"}]\n{"prompt": "\\ud800"}')
    assert [row.text for row in rows] == ["a"] and summary.num_rejected == 3
    assert "the row cannot be stored: 'utf-8'" in rejects(tmp_path)[-1]["reason"]


def test_where_the_reject_file_cannot_be(tmp_path):
    (tmp_path / "out.h5.rejected.jsonl").mkdir()
    with pytest.raises(DataError, match="cannot write .*rejected.jsonl"):
        run(tmp_path, '{"prompt": "a"}')


def test_streams_have_other_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}')
    with pytest.raises(UsageError, match="to a stream"):
        convert(["in.jsonl"], "-")
    with pytest.raises(DataError, match="/dev/stdin"):
        convert(["-"], "out.h5", format="jsonl")
    assert os.listdir(tmp_path) == ["in.jsonl"]
