"""Prompts files as they are written: round trips, atomicity, the fingerprint, what plain h5py sees."""

from __future__ import annotations

import dataclasses
import os

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.data.prompts import packed, schema
from hpcinfer.data.prompts.prompts_writer import MAX_META_COLUMNS, PromptsWriter
from hpcinfer.data.prompts.reader import open_prompts, prefix_fingerprint, sampling_for
from hpcinfer.errors import ConfigError, DataError
from hpcinfer.request import SamplingParams

OVERRIDES = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.integers(1, 1000),
        "temperature": st.floats(0, 4),
        "seed": st.integers(0, 2**63 - 1),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.lists(st.integers(0, 2**31 - 1), max_size=4),
        "stop": st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=5), max_size=3),
        "bad_words": st.lists(st.sampled_from(["a", " b c", "ü"]), max_size=2),
        "min_tokens": st.integers(0, 2**31 - 1),
        "presence_penalty": st.floats(-2, 2),
        "logit_bias": st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=3),
    },
)
UNICODE = st.characters(exclude_categories=["Cs"])
ROWS = st.lists(
    st.tuples(
        st.text(UNICODE, min_size=1),
        OVERRIDES,
        st.none() | st.text(UNICODE, min_size=1),
        st.dictionaries(st.text(UNICODE, max_size=5), st.integers() | st.text(UNICODE, max_size=3), max_size=3),
    ),
    max_size=12,
)


@given(rows=ROWS)
def test_what_is_written_is_read(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("prompts") / "p.h5"
    with PromptsWriter(path) as writer:
        for text, overrides, id, meta in rows:
            writer.append(text, id=id, overrides=overrides, meta=meta)
    with open_prompts(path) as reader:
        assert [row.text for row in reader.rows()] == [row[0] for row in rows]
        assert list(reader.ids()) == [row[2] for row in rows]
        for row, (_, overrides, _, _) in zip(reader.rows(), rows, strict=True):
            assert sampling_for(row, SamplingParams(max_tokens=7)) == dataclasses.replace(
                SamplingParams(max_tokens=7), **overrides
            )
    with h5py.File(path) as file:
        names = {schema.key_of_column(name) for name in file.get("meta", ())}
    assert names == {key for *_, meta in rows for key in meta}


@given(
    rows=st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9), max_size=9),
)
def test_token_ids_round_trip(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("prompts") / "p.h5"
    with PromptsWriter(path, kind="token_ids") as writer:
        for ids in rows:
            writer.append(ids)
    with open_prompts(path) as reader:
        read = list(reader.rows())
    assert [row.token_ids.tolist() for row in read] == rows
    assert all(row.token_ids.dtype == np.int32 and row.text is None for row in read)


def test_columns_that_appear_late_and_pass_flushes(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "FLUSH_BYTES", 512)
    path = tmp_path / "p.h5"
    with PromptsWriter(path) as writer:
        for row in range(5000):
            late = {"seed": row} if row in (3000, 3001, 4999) else None
            writer.append(f"prompt {row}", overrides=late, id=str(row) if row % 1000 == 500 else None)
    with open_prompts(path) as reader:
        rows = list(reader.rows())
        ids = list(reader.ids())
    given_rows = {row.row: dict(row.overrides) for row in rows if row.overrides}
    assert given_rows == {n: {"seed": n} for n in (3000, 3001, 4999)}
    assert {n: id for n, id in enumerate(ids) if id} == {n: str(n) for n in (500, 1500, 2500, 3500, 4500)}
    assert [row.text for row in rows] == [f"prompt {n}" for n in range(5000)]


def test_plain_h5py_sees_what_the_page_says(tmp_path):
    path = tmp_path / "p.h5"
    with PromptsWriter(path) as writer:
        writer.append("ab", overrides={"max_tokens": 3})
        writer.append("ç")
    with h5py.File(path, locking=False) as file:
        assert file.attrs["format"] == "hpcinfer-prompts"
        assert file.attrs["version"] == 1
        assert file.attrs["n_rows"] == 2
        assert file.attrs["fingerprint"].startswith("sha256:")
        data, offsets = file["prompts/data"], file["prompts/offsets"]
        assert (data.dtype, offsets.dtype) == (np.uint8, np.int64)
        assert data.fletcher32 and offsets.fletcher32
        assert offsets[:].tolist() == [0, 2, 4]
        assert bytes(data[2:4]).decode() == "ç"
        column = file["max_tokens"]
        assert column[:].tolist() == [3, column.attrs["not_given"]]


def test_chunks_are_64_kib(tmp_path):
    path = tmp_path / "p.h5"
    with PromptsWriter(path) as writer:
        for _ in range(20_000):
            writer.append("x" * 60)
    with h5py.File(path) as file:
        assert file["prompts/data"].chunks == (65536,)
        assert file["prompts/offsets"].chunks == (8192,)


def test_small_files_are_small(tmp_path):
    with PromptsWriter(tmp_path / "p.h5") as writer:
        writer.append("hello", id="a", overrides={"max_tokens": 3})
    assert (tmp_path / "p.h5").stat().st_size < 32_000


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), PromptsWriter(tmp_path / "p.h5") as writer:
        writer.append("hello")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_an_existing_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "p.h5"
    path.write_bytes(b"old")
    with PromptsWriter(path) as writer:
        writer.append("hello")
        assert path.read_bytes() == b"old"
    with open_prompts(path) as reader:
        assert reader.num_rows == 1


def test_no_folder_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="cannot write"):
        PromptsWriter(tmp_path / "no" / "p.h5")


@pytest.mark.parametrize(
    ("kind", "prompt", "extra"),
    [
        ("text", "lone \ud800 surrogate", {}),
        ("text", b"\xff", {}),
        ("text", 7, {}),
        ("text", "x", {"overrides": {"max_tokens": "many"}}),
        ("text", "x", {"overrides": {"no_such": 1}}),
        ("text", "x", {"overrides": {"temperature": float("nan")}}),
        ("text", "x", {"overrides": {"seed": 1, "presence_penalty": float("-inf")}}),
        ("text", "x", {"overrides": {"stop_token_ids": "12"}}),
        ("text", "x", {"meta": {"a": float("nan")}}),
        ("text", "x", {"meta": {"a": "\ud800"}}),
        ("text", "x", {"id": "\ud800"}),
        ("token_ids", [2**31], {}),
        ("token_ids", [-1], {}),
        ("token_ids", [1.5], {}),
        ("token_ids", [[1]], {}),
        ("token_ids", [2**70], {}),
        ("token_ids", "text", {}),
    ],
)
def test_a_row_that_cannot_be_stored_leaves_no_trace(tmp_path, kind, prompt, extra):
    good = "good" if kind == "text" else [1, 2]
    for name, rows in (("a.h5", [good, prompt, good]), ("b.h5", [good, good])):
        with PromptsWriter(tmp_path / name, kind=kind) as writer:
            for row in rows:
                if row is prompt:
                    with pytest.raises(DataError):
                        writer.append(row, **extra)
                else:
                    writer.append(row)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_too_many_meta_columns(tmp_path):
    with PromptsWriter(tmp_path / "p.h5") as writer, pytest.raises(DataError, match="meta columns"):
        for number in range(MAX_META_COLUMNS + 1):
            writer.append("x", meta={f"key{number}": 1})


@pytest.mark.parametrize("key", ["", ".", "..", "a/b", "%2F", "\0", "%", "plain", "é ünï"])
def test_any_key_is_a_column_name(key):
    name = schema.column_name(key)
    assert name not in ("", ".", "..") and "/" not in name and "\0" not in name
    assert schema.key_of_column(name) == key


def _write(path, texts, overrides=None, **extra):
    with PromptsWriter(path) as writer:
        for row, text in enumerate(texts):
            writer.append(text, overrides=(overrides or {}).get(row), **extra)
    with open_prompts(path) as reader:
        return reader.fingerprint_of(reader.num_rows)


def test_the_fingerprint_is_of_the_content(tmp_path):
    texts = [f"prompt {n}" for n in range(3000)]
    base = _write(tmp_path / "a.h5", texts)
    assert _write(tmp_path / "b.h5", texts, id="an id", meta={"x": 1}) == base
    changed = texts.copy()
    changed[1500] = "Prompt 1500"
    assert _write(tmp_path / "c.h5", changed) != base
    assert _write(tmp_path / "d.h5", [*texts[:-2], texts[-2] + texts[-1][0], texts[-1][1:]]) != base
    assert _write(tmp_path / "e.h5", texts, {7: {"seed": 1}}) != base
    assert _write(tmp_path / "e.h5", texts, {8: {"seed": 1}}) != _write(tmp_path / "f.h5", texts, {7: {"seed": 1}})


@pytest.mark.parametrize("num_rows", [0, 1, 1023, 1024, 1025, 2048, 2999, 3000])
def test_the_fingerprint_of_a_first_part_is_that_of_a_file_of_it(tmp_path, num_rows):
    texts = [f"prompt {n}" for n in range(3000)]
    overrides = {n: {"temperature": n / 7, "stop_token_ids": [n]} for n in range(0, 3000, 3)}
    _write(tmp_path / "whole.h5", texts, overrides)
    part = _write(tmp_path / "part.h5", texts[:num_rows], overrides)
    with open_prompts(tmp_path / "whole.h5") as whole, open_prompts(tmp_path / "part.h5") as first:
        assert whole.fingerprint_of(num_rows) == part
        assert prefix_fingerprint(whole, num_rows) == prefix_fingerprint(first)


def test_every_sampling_field_but_n_has_a_column():
    assert set(schema.SAMPLING_COLUMNS) == {field.name for field in dataclasses.fields(SamplingParams)} - {"n"}
    dtypes = {name: column.dtype for name, column in schema.SAMPLING_COLUMNS.items()}
    assert dtypes["temperature"] == "f8" and dtypes["seed"] == "i8" and dtypes["ignore_eos"] == "i1"
    assert dtypes["include_stop_str_in_output"] == "i1" and dtypes["min_tokens"] == "i8" and dtypes["repetition_penalty"] == "f8"
    assert dtypes["logit_bias"] == "json" and schema.SAMPLING_COLUMNS["stop"].items is schema.SAMPLING_COLUMNS["bad_words"].items is str
    assert dtypes["stop_token_ids"] == "json" and schema.SAMPLING_COLUMNS["stop_token_ids"].items is int


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_tokens", 1.5), ("max_tokens", True), ("max_tokens", 2**63), ("temperature", "hot"), ("temperature", True),
     ("ignore_eos", 1), ("stop_token_ids", "12"), ("stop_token_ids", [True]), ("stop_token_ids", [1.0]),
     ("stop", [1]), ("stop", ""), ("bad_words", {"a": 1}), ("logit_bias", [1]), ("logit_bias", {"a": 1}), ("logit_bias", "x"),
     ("presence_penalty", 3), ("min_tokens", -1),
     ("max_tokens", float("nan")), ("max_tokens", 0), ("temperature", float("nan")), ("top_p", 2)],
)  # fmt: skip
def test_wrong_sampling_values(name, value):
    with pytest.raises(ConfigError, match=name):
        schema.checked_overrides({name: value})


def test_whole_floats_are_integers():
    assert schema.checked_overrides({"max_tokens": 32.0, "temperature": 1}) == {"max_tokens": 32, "temperature": 1.0}
