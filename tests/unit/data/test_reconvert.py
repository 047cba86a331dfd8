"""Prompts that are converted once more, and conversions in the place of earlier ones: nothing is lost without a word."""

from __future__ import annotations

import json
import sys

import pytest

from hpcinfer.data.convert.base import ConvertOptions
from hpcinfer.data.convert.driver import convert
from hpcinfer.data.export import ExportOptions, export
from hpcinfer.data.generations import encode_generations
from hpcinfer.data.prompts import schema
from hpcinfer.data.prompts.reader import open_prompts
from hpcinfer.errors import ConfigError, DataError, UsageError
from hpcinfer.request import Generation, Status

ROWS = [
    {"prompt": "a longer one", "id": "x", "max_tokens": 5, "tag": {"k": 1}},
    {"prompt": "short", "id": "y", "temperature": 0.5, "tag": None, "other": "o"},
]


def write_lines(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def rows_of(path):
    with open_prompts(path) as reader:
        metas = {name: list(reader.meta(name)) for name in reader.meta_names()}
        return [
            (row.text, id, dict(row.overrides or {}), {name: column[row.row] for name, column in metas.items()})
            for row, id in zip(reader.rows(), reader.ids(), strict=True)
        ]


@pytest.fixture
def first(tmp_path):
    convert([write_lines(tmp_path / "in.jsonl", [*ROWS, "bad", {"prompt": ""}])], tmp_path / "first.h5", options=ConvertOptions(meta_columns="all"))
    return tmp_path / "first.h5"


def test_meta_and_sampling_columns_are_kept_as_asked(first, tmp_path):
    summary = convert([first], tmp_path / "all.h5", options=ConvertOptions(meta_columns="all"))
    assert rows_of(tmp_path / "all.h5") == rows_of(first) and summary.num_rejected == 2
    convert([first], tmp_path / "some.h5", options=ConvertOptions(meta_columns="other", sampling_columns="temperature"))
    assert rows_of(tmp_path / "some.h5") == [("a longer one", "x", {}, {"other": None}), ("short", "y", {"temperature": 0.5}, {"other": "o"})]
    convert([first], tmp_path / "none.h5", options=ConvertOptions(sampling_columns="none"))
    assert rows_of(tmp_path / "none.h5") == [("a longer one", "x", {}, {}), ("short", "y", {}, {})]
    with pytest.raises(DataError, match="no meta column 'nobody'"):
        convert([first], tmp_path / "no.h5", options=ConvertOptions(meta_columns="nobody"))
    with pytest.raises(UsageError, match="no sampling column"):
        convert([first], tmp_path / "no.h5", options=ConvertOptions(sampling_columns="nobody"))


def test_what_was_rejected_stays_rejected(first, tmp_path):
    convert([first], tmp_path / "again.h5", sort="length")
    found, before = (
        [json.loads(line) for line in (tmp_path / f"{name}.h5.rejected.jsonl").read_text().splitlines()] for name in ("again", "first")
    )
    assert [(entry["reason"], entry["row"]) for entry in found] == [(entry["reason"], entry["line"]) for entry in before]
    (tmp_path / "first.h5.rejected.jsonl").unlink()
    assert convert([first], tmp_path / "lost.h5").num_rejected == 2


def test_a_batch_of_openai_sorted_afterwards(tmp_path):
    batch = [
        {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": name * 5}} for name in "ab"
    ]
    convert([write_lines(tmp_path / "in.jsonl", [*batch, "bad"])], tmp_path / "q.h5", format="openai")
    convert([tmp_path / "q.h5"], tmp_path / "sorted.h5", sort="length", options=ConvertOptions(meta_columns="all"))
    (tmp_path / "g.h5").write_bytes(encode_generations([Generation(row=row, status=Status.OK, text="t") for row in range(2)], "uuid"))
    summary = export(tmp_path / "g.h5", tmp_path / "out.jsonl", ExportOptions(format="openai", prompts=str(tmp_path / "sorted.h5")))
    assert (summary.num_rows, summary.num_errors) == (2, 1)


def test_a_failed_conversion_leaves_the_earlier_one_its_rejects(first, tmp_path):
    before = (tmp_path / "first.h5.rejected.jsonl").read_text()
    with pytest.raises(DataError, match="no good prompt"):
        convert([write_lines(tmp_path / "bad.jsonl", ["worse"])], first, overwrite=True)
    assert (tmp_path / "first.h5.rejected.jsonl").read_text() == before
    assert "worse" in (tmp_path / "first.h5.failed.rejected.jsonl").read_text()
    with pytest.raises(DataError, match="1 line rejected.*\n.*first.h5.failed.rejected.jsonl"):
        convert([write_lines(tmp_path / "some.jsonl", ["worse", ROWS[0]])], first, overwrite=True, max_rejected=lambda total: 0)
    assert convert([tmp_path / "some.jsonl"], first, overwrite=True).reject_file == str(tmp_path / "first.h5.rejected.jsonl")
    assert "worse" in (tmp_path / "first.h5.rejected.jsonl").read_text()


def test_sorting_takes_no_column_of_the_users(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "p", "source_row": 77}])
    with pytest.raises(DataError, match="source_row.*\n.*77"):
        convert([source], tmp_path / "out.h5", sort="length", options=ConvertOptions(meta_columns="all"))
    convert([source], tmp_path / "out.h5", sort="length")


@pytest.mark.parametrize("name", ["structured_json", "structured_regex", "logit_bias", "stop", "bad_words", "max_tokens"])
def test_values_of_many_levels_are_rejected_or_kept(name):
    """Just under what the parser takes there are levels that printing does not."""
    for depth in range(sys.getrecursionlimit() - 150, sys.getrecursionlimit(), 3):
        value: object = 1
        for _ in range(depth):
            value = {"a": value}
        try:
            schema.checked_overrides({name: value})
        except ConfigError as error:
            assert len(str(error)) < 1000
