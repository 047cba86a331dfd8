"""Tables to prompts: CSV and Parquet, prompts made of columns or chats, compressed sources, sorting."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os

import h5py
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hpcinfer.data.convert import order as order_module
from hpcinfer.data.convert.base import ConvertOptions, Record
from hpcinfer.data.convert.driver import convert
from hpcinfer.data.convert.order import Sorter
from hpcinfer.data.prompts import schema
from hpcinfer.data.prompts.reader import open_prompts
from hpcinfer.data.tokenize import Tokenizer
from hpcinfer.errors import CheckpointError, DataError, HpcinferError, UsageError
from tests.conftest import ROOT
from tests.unit.data.chat_templates import STYLES

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def run(source, *, sort="", **settings):
    destination = source.parent / "out.h5"
    summary = convert([source], destination, options=ConvertOptions(**settings), sort=sort, overwrite=True)
    with open_prompts(destination) as reader:
        rows, ids = list(reader.rows()), list(reader.ids())
    path = source.parent / "out.h5.rejected.jsonl"
    rejects = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert summary.num_rejected == len(rejects)
    with h5py.File(destination) as file:
        assert file.attrs["n_rejected"] == len(rejects)
    return rows, ids, rejects


def texts(rows):
    return [row.text for row in rows]


def meta_of(path, name):
    with h5py.File(path) as file:
        group = file["meta"][name]
        data, offsets = group["data"][:].tobytes(), group["offsets"][:]
    return [json.loads(data[a:b]) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


CSV = (
    "id,prompt,temperature,max_tokens,stop_token_ids,note\r\n"
    '1,"two\nlines, ""quoted""",0.5,7,"[1, 2]",x\r\n'
    "\r\n"
    "2,plain,,,,\r\n"
    "3,too,few\r\n"
    "4,warm,hot,,,\r\n"
    ',no id,,,,"a ""note"""\r\n'
)


def test_csv(tmp_path):
    (tmp_path / "in.csv").write_text(CSV, newline="")
    rows, ids, rejects = run(tmp_path / "in.csv", meta_columns="note")
    assert texts(rows) == ['two\nlines, "quoted"', "plain", "no id"] and ids == ["1", "2", None]
    assert dict(rows[0].overrides) == {"temperature": 0.5, "max_tokens": 7, "stop_token_ids": (1, 2)}
    assert dict(rows[1].overrides) == {}
    assert [(entry["line"], "3 fields" in entry["reason"]) for entry in rejects] == [(6, True), (7, False)]
    assert "temperature" in rejects[1]["reason"]
    assert meta_of(tmp_path / "out.h5", "note") == ["x", "", 'a "note"']


def test_cells_of_sampling_columns(monkeypatch):
    from hpcinfer.data.convert.columns import _sampling_of_text

    columns = schema.SAMPLING_COLUMNS
    for name, items in (("stop", str), ("logit_bias", None), ("structured_regex", None)):
        monkeypatch.setitem(columns, name, schema.SamplingColumn(name, "json", None, items))
    for name, text, value in (
        ("seed", "5", 5), ("ignore_eos", "true", True), ("temperature", "hot", "hot"), ("stop", "5", "5"), ("stop", "[0-9]", "[0-9]"),
        ("stop", '["a", "b"]', ["a", "b"]), ("structured_regex", "[1]", "[1]"), ("structured_regex", "a+", "a+"),
        ("logit_bias", '{"5": 1}', {"5": 1}), ("stop_token_ids", "[1, 2]", [1, 2]),
    ):  # fmt: skip
        assert _sampling_of_text(name, text) == value


def test_csv_with_other_delimiters(tmp_path):
    (tmp_path / "in.tsv.gz").write_bytes(gzip.compress(b"prompt\tid\na,b\t1\n"))
    assert texts(run(tmp_path / "in.tsv.gz")[0]) == ["a,b"]
    (tmp_path / "in.csv").write_text("prompt;id\na,b;1\n")
    assert texts(run(tmp_path / "in.csv", delimiter=";")[0]) == ["a,b"]
    for bad in ('"', "ab", "\n"):
        with pytest.raises(UsageError, match="one character"):
            run(tmp_path / "in.csv", delimiter=bad)


def test_a_stray_quote_costs_one_line(tmp_path):
    lines = ["id,prompt", "1,a", '2,"never closed', '3,"b"', "4,c", '5,"d" e', "6,f", '7,"open at the end', "8,g"]
    (tmp_path / "in.csv").write_text("\n".join(lines))
    rows, ids, rejects = run(tmp_path / "in.csv")
    assert ids == ["1", "3", "4", "6", "8"] and texts(rows) == ["a", "b", "c", "f", "g"]
    assert [entry["line"] for entry in rejects] == [3, 6, 8]


def test_csv_lines_that_are_too_long_or_not_text(tmp_path):
    content = b"id,prompt\n1,a\n2," + b"x" * 500 + b'\n3,b\n4,"' + b"y\n" * 300 + b'5,c\n6,\xff\n7,d\n'
    (tmp_path / "in.csv").write_bytes(content)
    rows, ids, rejects = run(tmp_path / "in.csv", max_line_bytes=400)
    assert ids == ["1", "3", "5", "7"]
    assert "longer than 400" in rejects[0]["reason"] and "UTF-8" in rejects[-1]["reason"]


def test_csv_headers_that_do_not_fit(tmp_path):
    for content, words in (
        ("a,a\n1,2\n", "'a' twice"), ("x,y\n1,2\n", "none of the columns"), ("", "no good prompt"), ('"open\n', "header"),
        (b"\xff,prompt\n1,2\n", "header"),
    ):  # fmt: skip
        (tmp_path / "in.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(DataError, match=words):
            run(tmp_path / "in.csv")


def write_parquet(path, columns, **settings):
    pq.write_table(pa.table(columns), path, **settings)
    return path


def test_parquet(tmp_path):
    import datetime
    import decimal

    source = write_parquet(tmp_path / "in.parquet", {
        "prompt": ["a", None, "", "ü 🙂"], "id": pa.array([1, 2, 3, None], pa.int64()), "seed": [5, 6, 7, None],
        "temperature": [0.5, 1.0, 1.0, float("nan")], "day": [datetime.date(2026, 1, 2)] * 4,
        "price": [decimal.Decimal("1.50")] * 4, "tags": [["x"], [], None, ["y", "z"]], "gap": [float("nan"), 1.0, 2.0, 3.0],
    })  # fmt: skip
    rows, ids, rejects = run(source, meta_columns="all")
    assert texts(rows) == ["a"] and ids == ["1"] and dict(rows[0].overrides) == {"seed": 5, "temperature": 0.5}
    assert [entry["row"] for entry in rejects] == [1, 2, 3] and "temperature" in rejects[2]["reason"]
    stored = {name: meta_of(tmp_path / "out.h5", name) for name in ("day", "price", "tags", "gap")}
    assert stored == {"day": ["2026-01-02"], "price": ["1.50"], "tags": [["x"]], "gap": [None]}


def test_parquet_of_token_ids_in_many_row_groups(tmp_path):
    ids = [[row, row + 1] for row in range(5000)]
    source = write_parquet(tmp_path / "in.parquet", {"prompt": pa.array(ids, pa.list_(pa.int32()))}, row_group_size=700)
    rows, _, _ = run(source)
    assert [row.token_ids.tolist() for row in rows] == ids


def test_one_bad_text_in_parquet_costs_one_row(tmp_path):
    raw = pa.array([b"a", b"\xff\xfe", b"b"], pa.binary())
    source = write_parquet(tmp_path / "in.parquet", {"prompt": _unchecked(raw)})
    rows, _, rejects = run(source)
    assert texts(rows) == ["a", "b"]
    assert rejects[0]["row"] == 1 and "utf-8" in rejects[0]["reason"]


def _unchecked(raw):
    """Bytes called text without a look at them, as careless writers do."""
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())


def test_parquet_that_cannot_be_read(tmp_path):
    source = write_parquet(tmp_path / "in.parquet", {"prompt": [f"prompt {n}" for n in range(10_000)]}, compression="none")
    content = source.read_bytes()
    broken = bytearray(content)
    broken[40:60] = b"\xff" * 20
    for bad in (b"", b"PAR1", content[:-30], content[: len(content) // 2], b"not parquet" * 10, bytes(broken)):
        source.write_bytes(bad)
        with pytest.raises(DataError):
            run(source)
    with pytest.raises(DataError, match="none of the columns asked for"):
        run(write_parquet(tmp_path / "in.parquet", {"text": ["a"]}))
    with pytest.raises(DataError, match="is a folder"):
        (tmp_path / "folder.parquet").mkdir()
        convert([tmp_path / "folder.parquet"], tmp_path / "out2.h5", format="parquet")


def test_without_pyarrow_the_error_names_the_extra(tmp_path, monkeypatch):
    import sys

    source = write_parquet(tmp_path / "in.parquet", {"prompt": ["a"]})
    (tmp_path / "in.jsonl.zst").write_bytes(pa.compress(b'{"prompt": "a"}\n', "zstd", asbytes=True))
    for name in [name for name in sys.modules if name.split(".")[0] == "pyarrow"]:
        monkeypatch.setitem(sys.modules, name, None)
    for path in (source, tmp_path / "in.jsonl.zst"):
        with pytest.raises(DataError, match=r"hpcinfer\[tables\]"):
            run(path)


def test_prompt_templates(tmp_path):
    lines = [{"text": "a {b}", "n": 3, "tags": ["ü"]}, {"text": "x", "n": None, "tags": 1}, {"text": "y", "n": 1.5, "tags": {}}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows, _, rejects = run(tmp_path / "in.jsonl", prompt_template="{text}: {{{n}}} {tags}", meta_columns="all")
    assert texts(rows) == ['a {b}: {3} ["ü"]', "y: {1.5} {}"]
    assert rejects[0]["line"] == 2 and "no column 'n'" in rejects[0]["reason"]
    assert meta_of(tmp_path / "out.h5", "text") == ["a {b}", "y"]
    source = write_parquet(tmp_path / "in.parquet", {"a.b": ["1"], "my column": ["2"]})
    assert texts(run(source, prompt_template="{a.b}-{my column}")[0]) == ["1-2"]
    for bad in ("no column", "{", "}", "{a", "a}", "{}", "{a}}"):
        with pytest.raises(UsageError):
            run(tmp_path / "in.jsonl", prompt_template=bad)


def test_options_without_meaning_are_refused(tmp_path):
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file.create_dataset("text", data=[b"a"], dtype=h5py.string_dtype())
    for name, settings in (("in.h5", {"prompt_template": "{text}"}), ("in.h5", {"as_chat": True}), ("in.h5", {"chat_column": "text"})):
        with pytest.raises(UsageError, match="no meaning"):
            run(tmp_path / name, **settings)


def test_a_prompt_template_reaches_no_attribute(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"text.__class__": "a column"}\n')
    rows, _, rejects = run(tmp_path / "in.jsonl", prompt_template="{text.__class__}")
    assert texts(rows) == ["a column"] and len(rejects) == 1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The demo model's tokenizer with a post-processor that adds <bos>, and a chat template that writes it too."""
    folder = tmp_path_factory.mktemp("model")
    demo = ROOT / "datasets" / "demo-model"
    tokenizer = json.loads((demo / "tokenizer.json").read_text())
    special = {"id": "<bos>", "ids": [257], "tokens": ["<bos>"]}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "special_tokens": {"<bos>": special},
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
    }  # fmt: skip
    config = json.loads((demo / "tokenizer_config.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": STYLES["turns"]}))
    return str(folder)


def test_chats_become_token_ids_with_their_special_tokens_once(tmp_path, model):
    chats = [
        {"messages": [{"role": "user", "content": "hi"}], "id": "a", "seed": 3},
        {"messages": "no list"}, {"messages": []}, {"other": 1}, {"messages": [{"content": "hi"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "continue_final_message": True},
    ]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, chats)))
    rows, ids, rejects = run(tmp_path / "in.jsonl", chat_column="messages", model=model)
    expected = "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"
    plain = Tokenizer(ROOT / "datasets" / "demo-model")
    assert rows[0].token_ids.tolist() == plain.encode(expected).tolist()
    assert rows[0].token_ids.tolist().count(257) == 1 and dict(rows[0].overrides) == {"seed": 3}
    ends = "<start_of_turn>model\ny"
    assert rows[1].token_ids.tolist()[-len(ends) :] == plain.encode(ends).tolist()
    assert ids == ["a", None] and [entry["line"] for entry in rejects] == [2, 3, 4, 5]


def test_text_as_a_chat(tmp_path, model):
    lines = [{"prompt": "hi", "n": 2}, {"prompt": [1, 2]}, {"prompt": "", "n": 1}, {"prompt": "[1] {x}", "n": 3}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "in.txt").write_text("hi\n\n[1] {x}\n")
    plain = Tokenizer(ROOT / "datasets" / "demo-model")

    def ids(*turns):
        text = "".join(f"<start_of_turn>{role}\n{content}<end_of_turn>\n" for role, content in turns)
        return plain.encode(f"<bos>{text}<start_of_turn>model\n").tolist()

    for name in ("in.jsonl", "in.txt"):
        rows, _, rejects = run(tmp_path / name, model=model, as_chat=True)
        assert [row.token_ids.tolist() for row in rows] == [ids(("user", "hi")), ids(("user", "[1] {x}"))]
        assert len(rejects) == (2 if name == "in.jsonl" else 1)
    settings = {"model": model, "as_chat": True, "prompt_template": "{n}: {prompt}", "system_prompt": "Be {brief}."}
    rows, _, _ = run(tmp_path / "in.jsonl", **settings)
    assert rows[0].token_ids.tolist() == ids(("system", "Be {brief}."), ("user", "2: hi"))
    assert texts(run(tmp_path / "in.txt", prompt_template="Q: {prompt}")[0]) == ["Q: hi", "Q: [1] {x}"]
    for wrong in ({"as_chat": True}, {"system_prompt": "x"}, {"model": model, "as_chat": True, "chat_column": "m"}):
        with pytest.raises(UsageError):
            run(tmp_path / "in.jsonl", **wrong)


def test_chats_in_tables(tmp_path, model):
    chat = [{"role": "user", "content": "hi"}]
    wide = [*chat, {"role": "assistant", "content": "ok", "name": "me"}]
    source = write_parquet(tmp_path / "in.parquet", {"messages": [chat, wide]})
    (tmp_path / "in.csv").write_text("")
    with open(tmp_path / "in.csv", "w", newline="") as file:
        csv.writer(file).writerows([["messages"], [json.dumps(chat)], [json.dumps(wide)], ["hi"]])
    from_parquet, _, _ = run(source, chat_column="messages", model=model)
    from_csv, _, rejects = run(tmp_path / "in.csv", chat_column="messages", model=model)
    assert [row.token_ids.tolist() for row in from_csv] == [row.token_ids.tolist() for row in from_parquet]
    assert "not JSON" in rejects[0]["reason"]


def test_text_is_stored_as_the_run_would_tokenise_it(tmp_path, model):
    (tmp_path / "in.txt").write_text("one\ntwo\n")
    rows, _, _ = run(tmp_path / "in.txt", model=model)
    assert [row.token_ids.tolist() for row in rows] == [Tokenizer(model).encode(text).tolist() for text in ("one", "two")]


def test_chats_need_a_model_with_a_template(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}')
    with pytest.raises(UsageError, match="--model"):
        run(tmp_path / "in.jsonl", chat_column="messages")
    with pytest.raises(CheckpointError, match="no chat template"):
        run(tmp_path / "in.jsonl", chat_column="messages", model=str(ROOT / "datasets" / "demo-model"))
    with pytest.raises(UsageError, match="both"):
        run(tmp_path / "in.jsonl", chat_column="messages", prompt_template="{messages}")


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
def test_compressed_sources(tmp_path, kind):
    content = b"".join(b'{"prompt": "number %d"}\n' % n for n in range(3000))
    if kind == "zst":
        with pa.CompressedOutputStream(str(tmp_path / "in.jsonl.zst"), "zstd") as out:
            out.write(content)
    else:
        packed = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[kind](content)
        (tmp_path / f"in.jsonl.{kind}").write_bytes(packed)
    source = tmp_path / f"in.jsonl.{kind}"
    packed = source.read_bytes()
    assert len(packed) < len(content)
    assert texts(run(source)[0]) == [f"number {n}" for n in range(3000)]
    # Two archives, one after the other, are one.
    source.write_bytes(packed * 2)
    assert len(run(source)[0]) == 6000
    for bad in (packed[:-20], packed[: len(packed) // 2] + b"\0" * 50 + packed[len(packed) // 2 :]):
        source.write_bytes(bad)
        with pytest.raises(DataError, match="breaks off"):
            run(source)


def test_plain_text_that_begins_like_an_archive(tmp_path):
    (tmp_path / "in.txt").write_text("BZh91 is a word\nPK\n")
    assert texts(run(tmp_path / "in.txt")[0]) == ["BZh91 is a word", "PK"]


def test_a_source_that_changes_is_refused(tmp_path, monkeypatch):
    from hpcinfer.data.convert.lines import JsonLines

    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    records = JsonLines.records

    def slowly(self, path):
        for item in records(self, path):
            yield item
            with open(path, "a") as file:
                file.write("\n")

    monkeypatch.setattr(JsonLines, "records", slowly)
    with pytest.raises(DataError, match="changed while it was read"):
        run(source)
    assert not (tmp_path / "out.h5").exists()


def test_sorting(tmp_path):
    prompts = ["ab 2", "b", "ab 1", "abc", "b", "ü"]
    lines = [json.dumps({"prompt": prompt, "id": str(n)}) for n, prompt in enumerate(prompts)]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines[:3], "bad", *lines[3:]]))
    rows, ids, rejects = run(tmp_path / "in.jsonl", sort="prefix")
    assert texts(rows) == ["ab 1", "ab 2", "abc", "b", "b", "ü"] and ids == ["2", "0", "3", "1", "4", "5"]
    assert meta_of(tmp_path / "out.h5", "source_row") == [2, 0, 3, 1, 4, 5] and len(rejects) == 1
    rows, ids, _ = run(tmp_path / "in.jsonl", sort="length")
    assert ids == ["0", "2", "3", "1", "4", "5"]
    with pytest.raises(UsageError, match="no order"):
        run(tmp_path / "in.jsonl", sort="width")
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.h5", "out.h5.rejected.jsonl"]


@given(
    prompts=st.lists(st.text(min_size=1, max_size=6) | st.lists(st.integers(0, 9), min_size=1, max_size=4), max_size=30),
    order=st.sampled_from(["prefix", "length"]),
)
def test_sorting_on_disk_is_sorting(tmp_path_factory, prompts, order):
    folder = tmp_path_factory.mktemp("sort")
    prompts = [p for p in prompts if type(p) is type(prompts[0])]
    with pytest.MonkeyPatch.context() as patch, Sorter(order, folder, run_bytes=1200) as sorter:
        patch.setattr(order_module, "_MOST_RUNS", 2)
        for number, prompt in enumerate(prompts):
            given_prompt = prompt if isinstance(prompt, str) else np.array(prompt, np.int32)
            sorter.add(number % 3, Record(number, given_prompt, str(number), {"seed": number}))
        found = list(sorter.items())
    expected = sorted(range(len(prompts)), key=lambda n: (prompts[n] if order == "prefix" else -len(prompts[n]), n))
    assert [record.number for _, record in found] == expected
    for source, record in found:
        assert list(record.prompt) == list(prompts[record.number]) and source == record.number % 3
        assert (record.id, record.overrides) == (str(record.number), {"seed": record.number})
    assert os.listdir(folder) == []


def test_a_row_that_cannot_be_sorted_fails_alone(tmp_path):
    source = write_parquet(tmp_path / "in.parquet", {"prompt": ["b", "a"], "blob": [b"\xff", None]})
    rows, _, rejects = run(source, sort="prefix", meta_columns="blob")
    assert texts(rows) == ["a"] and rejects[0]["row"] == 0


CELLS = st.sampled_from(["", "a", '"', '""', "x,y", "\n", "\r\n", '"q"', "ü", "\ud800", "1e999", "[1", "null", "\x00", "id"])


@given(cells=st.lists(st.lists(CELLS, max_size=4), max_size=6), raw=st.binary(max_size=40))
@example(cells=[['"', '"']], raw=b'"\n"')
def test_any_csv_gives_rows_or_our_errors(tmp_path_factory, cells, raw):
    source = tmp_path_factory.mktemp("fuzz") / "in.csv"
    body = "\n".join(",".join(row) for row in cells).encode("utf-8", "surrogatepass")
    source.write_bytes(b"id,prompt,temperature\n0,first,\n" + body + b"\n" + raw + b"\n9,last,\n")
    rows, _, _ = run(source, meta_columns="all")
    assert rows[0].text == "first" and rows[-1].text.endswith("last")


VALUES = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=4) | st.binary(max_size=4)


@given(
    columns=st.dictionaries(
        st.sampled_from(["prompt", "id", "temperature", "seed", "stop_token_ids", "a.b", ""]), st.lists(VALUES, min_size=4, max_size=4),
        max_size=4,
    ),
    flips=st.lists(st.tuples(st.integers(0, 2**16), st.integers(1, 255)), max_size=3),
)  # fmt: skip
def test_any_parquet_gives_rows_or_our_errors(tmp_path_factory, columns, flips):
    source = tmp_path_factory.mktemp("fuzz") / "in.parquet"
    table = {}
    for name, values in columns.items():
        kind = next((type(value) for value in values if value is not None), str)
        table[name] = pa.array([value if type(value) is kind else None for value in values])
    write_parquet(source, table)
    content = bytearray(source.read_bytes())
    for place, bits in flips:
        content[place % len(content)] ^= bits
    source.write_bytes(content)
    try:
        run(source, meta_columns="all")
    except HpcinferError as error:
        assert str(error)


def test_binary_values_are_the_text_that_they_hold(tmp_path):
    table = pa.table({"prompt": pa.array(["one \u00fc".encode(), b"\xff", b"two"], pa.binary()), "note": [b"x", b"y", b"z"]})
    pq.write_table(table, tmp_path / "in.parquet")
    rows, _, rejects = run(tmp_path / "in.parquet", meta_columns="note")
    assert texts(rows) == ["one \u00fc", "two"] and [entry["row"] for entry in rejects] == [1]
    assert meta_of(tmp_path / "out.h5", "note") == ["x", "z"]
