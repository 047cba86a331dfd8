"""OpenAI batches: every line comes back once, as a response or as an error, in the layout of the API."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcinfer.data.convert import openai_body
from hpcinfer.data.convert.base import ConvertOptions
from hpcinfer.data.convert.driver import convert
from hpcinfer.data.export import ExportOptions, export
from hpcinfer.data.export_logprobs import LogprobWriter
from hpcinfer.data.generations import encode_generations
from hpcinfer.data.prompts.reader import open_prompts
from hpcinfer.data.tokenize import Tokenizer
from hpcinfer.errors import DataError, HpcinferError, UsageError
from hpcinfer.request import FinishReason, Generation, Status, TextScore
from tests.conftest import ROOT
from tests.mpi import rank_env
from tests.unit.data.chat_templates import STYLES
from tests.unit.data.openai_batch import CHOICES, MODEL, RESPONSE, ROW_FAILED, chat, completion, make_batch

DEMO = ROOT / "datasets" / "demo-model"
HEX = "[0-9a-f]{32}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The demo model with a chat template."""
    folder = tmp_path_factory.mktemp("models") / MODEL
    folder.mkdir()
    for path in DEMO.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "chat_template.jinja").write_text(STYLES["bracketed"])
    return str(folder)


def convert_lines(tmp_path, lines, **settings):
    source = tmp_path / "batch.jsonl"
    source.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return convert([source], tmp_path / "p.h5", format="openai", options=ConvertOptions(**settings), overwrite=True)


def rejected(tmp_path):
    return [json.loads(line) for line in (tmp_path / "p.h5.rejected.jsonl").read_text().splitlines()]


def entries(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def check_response(entry, url, num_samples=1):
    """A line of OpenAI's output file, key by key."""
    assert set(entry) == {"id", "custom_id", "response", "error"} and entry["error"] is None
    assert re.fullmatch(f"batch_req_{HEX}", entry["id"])
    response = entry["response"]
    assert set(response) == {"status_code", "request_id", "body"} and response["status_code"] == 200
    assert re.fullmatch(f"req_{HEX}", response["request_id"])
    body = response["body"]
    assert set(body) == {"id", "object", "created", "model", "choices", "usage", "system_fingerprint"}
    is_chat = url == "/v1/chat/completions"
    assert body["object"] == ("chat.completion" if is_chat else "text_completion")
    assert re.fullmatch(("chatcmpl-" if is_chat else "cmpl-") + HEX, body["id"])
    assert type(body["created"]) is int and body["model"] == MODEL
    assert set(body["usage"]) == {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"] > 0
    assert [choice["index"] for choice in body["choices"]] == list(range(num_samples))
    for choice in body["choices"]:
        assert choice["finish_reason"] in ("stop", "length") and choice["logprobs"] is None
        if is_chat:
            assert set(choice) == {"index", "message", "logprobs", "finish_reason"}
            assert set(choice["message"]) == {"role", "content", "refusal"} and choice["message"]["role"] == "assistant"
            assert isinstance(choice["message"]["content"], str) and choice["message"]["refusal"] is None
        else:
            assert set(choice) == {"index", "text", "logprobs", "finish_reason"} and isinstance(choice["text"], str)


def check_error(entry):
    """A line of OpenAI's error file, key by key."""
    assert set(entry) == {"id", "custom_id", "response", "error"} and entry["response"] is None
    assert re.fullmatch(f"batch_req_{HEX}", entry["id"])
    assert set(entry["error"]) == {"code", "message"} and entry["error"]["message"]


def test_a_batch_of_a_thousand_lines(tmp_path, model):
    """Through the command line, from the file to both files."""
    content, expected = make_batch(1000)
    batch, prompts, run, out = (f"{name} 'of' \"all\"\n[1] ü" for name in ("batch", "p", "run", "out"))
    (tmp_path / batch).write_bytes(content)
    assert {code for _, code in expected} >= {
        RESPONSE, ROW_FAILED, openai_body.INVALID_JSON, openai_body.MISSING, openai_body.INVALID, openai_body.MODEL,
        openai_body.UNSUPPORTED, openai_body.DUPLICATE,
    }  # fmt: skip
    job = ["jobs/demo.toml", *(word for setting in (
        f"model.path={model}", f"data.prompts={prompts}", f"data.output={run}", "parallel.tp=1", "sampling.max_tokens=8",
    ) for word in ("--set", setting))]  # fmt: skip
    job[0] = str(ROOT / job[0])
    for command in (
        ["convert", batch, prompts, "--format", "openai", "--model", model], ["run", *job], ["status", run], ["inspect", run],
        ["export", run, f"{out}.jsonl", "--format", "openai"],
    ):  # fmt: skip
        result = subprocess.run(
            [sys.executable, "-m", "hpcinfer", *command], cwd=tmp_path, env=rank_env() | {"PYTHONPATH": str(ROOT)}, capture_output=True,
            text=True, timeout=250, check=False,
        )  # fmt: skip
        assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    responses, errors = entries(tmp_path / f"{out}.jsonl"), entries(tmp_path / f"{out}.errors.jsonl")
    asked = {}
    for line in content.splitlines():
        try:
            value = json.loads(line)
            asked.setdefault(str(value["custom_id"]), value.get("url"))
        except (ValueError, TypeError, KeyError):
            continue
    for entry in responses:
        check_response(entry, asked[entry["custom_id"]])
    for entry in errors:
        check_error(entry)
    found = [(entry["custom_id"], RESPONSE) for entry in responses]
    found += [(entry["custom_id"], entry["error"]["code"]) for entry in errors]
    assert Counter(found) == Counter(expected) and len(found) == 1000
    named = Counter(custom_id for custom_id, _ in found if custom_id is not None)
    assert set(named.values()) == {1}
    assert [entry["custom_id"] for entry in responses] == [custom_id for custom_id, code in expected if code == RESPONSE]
    ids = [entry["id"] for entry in responses + errors]
    assert len(set(ids)) == len(ids)
    # The same bytes again, and a limit that a line gave itself was kept.
    export(tmp_path / run, tmp_path / "again.jsonl", ExportOptions(format="openai", prompts=str(tmp_path / prompts)))
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / f"{out}.jsonl").read_bytes()
    chosen = {json.loads(line)["custom_id"] for line in content.splitlines() if b'"choice"' in line}
    choices = [entry["response"]["body"]["choices"][0]["text"] for entry in responses if entry["custom_id"] in chosen]
    assert len(choices) > 20 and set(choices) <= set(CHOICES)
    used = {entry["response"]["body"]["usage"]["completion_tokens"] for entry in responses}
    assert max(used) == 8 and 2 in used


def test_what_a_body_becomes(tmp_path, model):
    lines = [
        chat(temperature=0.5, top_p=0.5, max_tokens=5, seed=9), chat(max_completion_tokens=6, user="x"), completion(max_tokens=7, top_k=3),
        completion(prompt=[49, 50]), chat(messages=[{"role": "user", "content": "a"}], tools=[], tool_choice="none"),
    ]  # fmt: skip
    for number, line in enumerate(lines):
        line["custom_id"] = f"r{number}"
    summary = convert_lines(tmp_path, lines, model=model)
    assert (summary.num_rows, summary.kind) == (5, "token_ids")
    with open_prompts(tmp_path / "p.h5") as reader:
        rows, ids = list(reader.rows()), list(reader.ids())
        meta = list(reader.meta("openai"))
    assert ids == ["r0", "r1", "r2", "r3", "r4"]
    assert [dict(row.overrides) for row in rows] == [
        {"temperature": 0.5, "top_p": 0.5, "max_tokens": 5, "seed": 9}, {"max_tokens": 6}, {"max_tokens": 7, "top_k": 3}, {}, {},
    ]  # fmt: skip
    assert rows[0].token_ids.tolist() == [257, *b"[INST] 1+2= [/INST]"]
    assert rows[2].token_ids.tolist() == list(b"1+2=") and rows[3].token_ids.tolist() == [49, 50]
    assert meta[0] == {"url": "/v1/chat/completions", "model": MODEL} and meta[2]["url"] == "/v1/completions"


@pytest.mark.parametrize(
    ("name", "value", "is_text"), [("stop", "a", True), ("stop", ["a"], False), ("presence_penalty", 0.5, False), ("min_tokens", 2, False),
                                   ("logit_bias", {"5": 1.0}, False), ("bad_words", ["x"], False), ("repetition_penalty", 1.1, False)],
)  # fmt: skip
def test_parameters_are_known_by_the_names_of_sampling(name, value, is_text):
    """Supported as soon as SamplingParams has the field, refused by name until then."""
    from hpcinfer.data.prompts import schema

    body = chat(**{name: value})["body"]
    if name in schema.SAMPLING_COLUMNS:
        given_value = openai_body.sampling_of(body, chat=True, num_samples=1)[name]
        assert given_value == (tuple([value] if is_text else value) if isinstance(value, str | list) else value)
    else:
        with pytest.raises(openai_body.Refused, match=name) as caught:
            openai_body.sampling_of(body, chat=True, num_samples=1)
        assert caught.value.code == openai_body.UNSUPPORTED


def test_forms_of_answers(monkeypatch):
    from hpcinfer.data.prompts import schema

    wanted = {"type": "object", "properties": {"a": {"type": "integer"}}}
    cases = [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": wanted}}},
            {"structured_json": json.dumps(wanted)},
        ),
        ({"response_format": {"type": "json_object"}}, {"structured_json": '{"type": "object"}'}),
        ({"structured_outputs": {"regex": "a+", "json": None}}, {"structured_regex": "a+"}),
        ({"structured_outputs": {"json": wanted}}, {"structured_json": json.dumps(wanted)}),
    ]
    for name in [name for name in schema.SAMPLING_COLUMNS if name.startswith("structured_")]:
        monkeypatch.delitem(schema.SAMPLING_COLUMNS, name)
    for body, _ in cases:
        with pytest.raises(openai_body.Refused, match="not supported"):
            openai_body.sampling_of(chat(**body)["body"], chat=True, num_samples=1)
    for name in ("structured_json", "structured_regex"):
        monkeypatch.setitem(schema.SAMPLING_COLUMNS, name, schema.SamplingColumn(name, "json", None))
    monkeypatch.setattr(schema, "checked_overrides", lambda values: values)
    for body, given_values in cases:
        assert openai_body.sampling_of(chat(**body)["body"], chat=True, num_samples=1) == given_values
    for body in (
        {"response_format": "json"}, {"response_format": {"type": "xml"}}, {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}, {"structured_outputs": []},
        {"structured_outputs": {"xml": "x"}},
    ):  # fmt: skip
        with pytest.raises(openai_body.Refused):
            openai_body.sampling_of(chat(**body)["body"], chat=True, num_samples=1)


def test_log_probabilities_are_asked_for_in_two_ways(monkeypatch):
    from hpcinfer.data.prompts import schema

    for line, is_chat, wanted in (
        (chat(logprobs=True), True, 0), (chat(logprobs=True, top_logprobs=3), True, 3), (completion(logprobs=2), False, 2),
    ):  # fmt: skip
        monkeypatch.delitem(schema.SAMPLING_COLUMNS, "logprobs", raising=False)
        with pytest.raises(openai_body.Refused, match="not supported"):
            openai_body.sampling_of(line["body"], chat=is_chat, num_samples=1)
        monkeypatch.setitem(schema.SAMPLING_COLUMNS, "logprobs", schema.SamplingColumn("logprobs", "i8", -(2**63)))
        monkeypatch.setattr(schema, "checked_overrides", lambda values: values)
        assert openai_body.sampling_of(line["body"], chat=is_chat, num_samples=1) == {"logprobs": wanted}
    for body in (chat(top_logprobs=3), chat(logprobs=5)):
        with pytest.raises(openai_body.Refused) as caught:
            openai_body.sampling_of(body["body"], chat=True, num_samples=1)
        assert caught.value.code == openai_body.INVALID
    assert openai_body.sampling_of(chat(logprobs=False, top_logprobs=0)["body"], chat=True, num_samples=1) == {}


def test_log_probabilities_in_both_forms():
    from types import SimpleNamespace

    found = SimpleNamespace(
        chosen=np.array([-0.5, -np.inf, -1.0], np.float32), top_ids=np.array([[97, 98], [195, -1], [258, 97]], np.int32),
        top=np.array([[-0.5, -2.0], [-0.25, np.nan], [-1.0, -3.0]], np.float32),
    )  # fmt: skip
    one = SimpleNamespace(token_ids=np.array([97, 195, 258], np.int32), logprobs=found, finish_reason=FinishReason.STOP)
    writer = LogprobWriter(Tokenizer(DEMO))
    content = writer.chat(one)["content"]
    assert content[0] == {
        "token": "a", "bytes": [97], "logprob": -0.5,
        "top_logprobs": [{"token": "a", "bytes": [97], "logprob": -0.5}, {"token": "b", "bytes": [98], "logprob": -2.0}],
    }  # fmt: skip
    # Half a character, without a probability; the end of sequence is no part of the answer.
    assert len(content) == 2 and content[1]["bytes"] is None and content[1]["logprob"] == -9999.0
    assert writer.completion(one) == {
        "tokens": ["a", "\ufffd"], "token_logprobs": [-0.5, -9999.0], "top_logprobs": [{"a": -0.5, "b": -2.0}, {"\ufffd": -0.25}],
        "text_offset": [0, 1],
    }  # fmt: skip
    json.dumps(writer.chat(one), allow_nan=False)


def test_served_models(tmp_path, model):
    lines = [completion(model=name) | {"custom_id": name} for name in ("a", MODEL, model, f"{model}/")]
    for settings, accepted in (
        ({}, 4), ({"model": model}, 2), ({"served_model_names": ("a",)}, 1), ({"model": model, "served_model_names": ("*",)}, 4),
        ({"model": model + "/"}, 3),
    ):  # fmt: skip
        assert convert_lines(tmp_path, lines, **settings).num_rows == accepted


def test_chats_need_a_model(tmp_path):
    with pytest.raises(UsageError, match="--model"):
        convert_lines(tmp_path, [chat() | {"custom_id": "a"}])
    assert convert_lines(tmp_path, [completion() | {"custom_id": "a"}]).kind == "text"


def test_custom_ids_are_unique_over_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(completion() | {"custom_id": "same"}) + "\n")
    convert([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "p.h5", format="openai")
    (entry,) = rejected(tmp_path)
    assert entry["code"] == openai_body.DUPLICATE and entry["source"].endswith("b.jsonl") and "id" not in entry


def write_generations(path, generations):
    path.write_bytes(encode_generations(generations, "run-uuid"))
    return path


def ok(row, sample=0, reason=FinishReason.STOP):
    return Generation(row=row, sample=sample, status=Status.OK, finish_reason=reason, text=f"{row}.{sample}", num_prompt_tokens=3,
                      token_ids=np.arange(2, dtype=np.int32))  # fmt: skip


def test_samples_failures_and_rows_that_are_missing(tmp_path):
    lines = [completion(n=2) | {"custom_id": f"r{n}"} for n in range(5)] + ["bad", completion(n=1) | {"custom_id": "r5"}]
    convert_lines(tmp_path, lines, num_samples=2)
    failed = Generation(row=1, sample=1, status=Status.FAILED, error="too long")
    partial = Generation(row=2, sample=0, status=Status.PARTIAL)
    source = write_generations(
        tmp_path / "g.h5", [ok(0), ok(0, 1, FinishReason.LENGTH), ok(1), failed, partial, ok(2, 1), ok(4), ok(4, 1)]
    )
    options = ExportOptions(format="openai", prompts=str(tmp_path / "p.h5"))
    summary = export(source, tmp_path / "out.jsonl", options)
    assert (summary.num_rows, summary.num_errors, summary.errors) == (2, 5, str(tmp_path / "out.errors.jsonl"))
    responses, errors = entries(tmp_path / "out.jsonl"), entries(tmp_path / "out.errors.jsonl")
    for entry in responses:
        check_response(entry, "/v1/completions", num_samples=2)
    choices = responses[0]["response"]["body"]["choices"]
    assert [choice["text"] for choice in choices] == ["0.0", "0.1"]
    assert [choice["finish_reason"] for choice in choices] == ["stop", "length"]
    assert responses[0]["response"]["body"]["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert [(entry["custom_id"], entry["error"]["code"]) for entry in errors] == [
        ("r1", "row_failed"), ("r2", "unfinished"), ("r3", "unfinished"), (None, "invalid_json"), ("r5", "invalid_request"),
    ]  # fmt: skip
    assert errors[0]["error"]["message"] == "too long" and errors[3]["error"]["message"].startswith("line 6: ")


def test_rejects_that_are_lost_are_noticed(tmp_path):
    convert_lines(tmp_path, [completion() | {"custom_id": "a"}, "bad", "worse"])
    source = write_generations(tmp_path / "g.h5", [ok(0)])
    options = ExportOptions(format="openai", prompts=str(tmp_path / "p.h5"))
    path = tmp_path / "p.h5.rejected.jsonl"
    whole = path.read_text()
    for content in (whole.splitlines()[0] + "\n", whole + "{}\n", whole[:-9], whole.splitlines()[0] + "\n[1]\n", None):
        path.unlink()
        if content is not None:
            path.write_text(content)
        with pytest.raises(DataError, match="2 lines were rejected"):
            export(source, tmp_path / "out.jsonl", options)
    assert not (tmp_path / "out.jsonl").exists() and not (tmp_path / "out.errors.jsonl").exists()


def test_two_files_or_none(tmp_path):
    convert_lines(tmp_path, [completion() | {"custom_id": "a"}])
    source = write_generations(tmp_path / "g.h5", [ok(0)])
    options = ExportOptions(format="openai", prompts=str(tmp_path / "p.h5"))
    (tmp_path / "out.errors.jsonl").write_text("precious")
    with pytest.raises(DataError, match=r"out.errors.jsonl exists"):
        export(source, tmp_path / "out.jsonl", options)
    assert (tmp_path / "out.errors.jsonl").read_text() == "precious" and not (tmp_path / "out.jsonl").exists()
    export(source, tmp_path / "out.jsonl", options, overwrite=True)
    assert (tmp_path / "out.errors.jsonl").read_bytes() == b""
    with pytest.raises(UsageError, match="--errors"):
        export(source, sys.stdout.buffer, options)
    with pytest.raises(DataError, match="--prompts"):
        export(source, tmp_path / "other.jsonl", ExportOptions(format="openai"))


@pytest.mark.parametrize("found", [{"score": TextScore(-3.0, 2)}, {"embedding": np.ones(4, np.float32)}])
def test_what_is_no_generation_has_no_place_there(tmp_path, found):
    """Lines without their scores would look like empty answers."""
    convert_lines(tmp_path, [completion() | {"custom_id": "a"}])
    source = write_generations(tmp_path / "g.h5", [Generation(row=0, status=Status.OK, num_prompt_tokens=3, **found)])
    with pytest.raises(UsageError, match="jsonl"):
        export(source, tmp_path / "out.jsonl", ExportOptions(format="openai", prompts=str(tmp_path / "p.h5")))
    assert not (tmp_path / "out.jsonl").exists() and not (tmp_path / "out.errors.jsonl").exists()


def test_prompts_of_another_origin(tmp_path):
    (tmp_path / "in.txt").write_text("a\nb\n")
    convert([tmp_path / "in.txt"], tmp_path / "p.h5")
    source = write_generations(tmp_path / "g.h5", [ok(0), ok(1)])
    export(source, tmp_path / "out.jsonl", ExportOptions(format="openai", prompts=str(tmp_path / "p.h5")))
    assert [entry["custom_id"] for entry in entries(tmp_path / "out.jsonl")] == ["row-0", "row-1"]
    shutil.copy(source, tmp_path / "more.h5")
    write_generations(tmp_path / "more.h5", [ok(0), ok(7)])
    with pytest.raises(DataError, match="not of"):
        export(tmp_path / "more.h5", tmp_path / "no.jsonl", ExportOptions(format="openai", prompts=str(tmp_path / "p.h5")))
    assert sorted(os.listdir(tmp_path)) == ["g.h5", "in.txt", "more.h5", "out.errors.jsonl", "out.jsonl", "p.h5"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**65) | st.floats() | st.text(max_size=4) | st.sampled_from(["POST", MODEL, "user"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["role", "content", "type", "self"]), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from([
    "model", "prompt", "messages", "n", "stop", "max_tokens", "max_completion_tokens", "temperature", "logprobs", "logit_bias", "tools",
    "chat_template_kwargs", "tool_choice", "response_format", "seed", "x", "add_special_tokens", "reasoning_effort", "documents",
    "continue_final_message",
])  # fmt: skip


@settings(max_examples=40)
@given(
    bodies=st.lists(st.tuples(st.booleans(), st.dictionaries(KEYS, VALUES, max_size=4)), max_size=5),
    outer=st.dictionaries(st.sampled_from(["custom_id", "method", "url", "body"]), VALUES, max_size=4),
    raw=st.binary(max_size=30),
)
def test_any_line_is_a_row_or_a_reject(tmp_path_factory, model, bodies, outer, raw):
    tmp_path = tmp_path_factory.mktemp("fuzz")
    lines = [(chat() if is_chat else completion()) for is_chat, _ in bodies]
    for number, (line, (_, body)) in enumerate(zip(lines, bodies, strict=True)):
        line["body"] |= body
        line["custom_id"] = f"r{number}"
    good = completion() | {"custom_id": "good"}
    content = [json.dumps(line).encode() for line in [good, *lines, chat() | outer]] + [raw.replace(b"\n", b"")]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(content))
    try:
        summary = convert([tmp_path / "in.jsonl"], tmp_path / "p.h5", format="openai", options=ConvertOptions(model=model))
    except HpcinferError as error:
        pytest.fail(str(error))
    blank = not raw.replace(b"\n", b"").strip()
    assert summary.num_rows + summary.num_rejected == len(content) - blank
    with open_prompts(tmp_path / "p.h5") as reader:
        assert next(iter(reader.ids())) == "good"
