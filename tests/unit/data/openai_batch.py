"""A batch file as OpenAI's API takes it, of good lines and of every kind of bad one, with what must become of each."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

MODEL = "demo-chat"
CHOICES = ["yes", "no"]
RESPONSE = "response"
ROW_FAILED = "row_failed"

Expected = tuple[str | None, str]
"""(custom_id as it must come back, or None; "response" or the code of the error)."""


def chat(**body: Any) -> dict[str, Any]:
    """A chat completion; values of None are left out."""
    return _line("/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": "1+2="}], **body})


def completion(**body: Any) -> dict[str, Any]:
    """A completion."""
    return _line("/v1/completions", {"model": MODEL, "prompt": "1+2=", **body})


def _line(url: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"custom_id": "", "method": "POST", "url": url, "body": {key: value for key, value in body.items() if value is not None}}


def _without(key: str) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        line = chat()
        del line[key]
        return line

    return make


def _with(key: str, value: Any) -> Callable[[], dict[str, Any]]:
    return lambda: chat() | {key: value}


GOOD: list[Callable[[], dict[str, Any]]] = [
    chat,
    lambda: chat(temperature=0.7, top_p=0.9, seed=3, max_tokens=3, user="u", metadata={"a": "b"}),
    lambda: chat(max_completion_tokens=2, n=1, stream=False, presence_penalty=0, logprobs=False, response_format={"type": "text"}),
    lambda: chat(
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ü 🙂 \u2028"}], frequency_penalty=0.0
    ),
    completion,
    lambda: completion(prompt=["sort 3 1:"], max_tokens=4, best_of=1, echo=False, suffix=""),
    lambda: completion(prompt=[49, 43, 50, 61], temperature=1, logit_bias={}),
    lambda: completion(prompt=[[49, 43, 50, 61]], top_k=5, ignore_eos=True, max_tokens=2),
    lambda: chat(stop="4", presence_penalty=0.5, frequency_penalty=-0.5, logit_bias={"52": -100, "51": 2.5}, temperature=1),
    lambda: completion(structured_outputs={"choice": CHOICES}, prompt="yes or no?"),
]
BAD: list[tuple[str, Callable[[], dict[str, Any]]]] = [
    ("missing_required_parameter", _without("body")),
    ("missing_required_parameter", _with("body", "text")),
    ("missing_required_parameter", lambda: _line("/v1/chat/completions", {"model": MODEL})),
    ("missing_required_parameter", lambda: completion(prompt=None)),
    ("missing_required_parameter", lambda: completion(prompt=7)),
    ("missing_required_parameter", lambda: chat(model=None)),
    ("invalid_request", _without("method")),
    ("invalid_request", _with("method", "GET")),
    ("invalid_request", _with("url", "/v1/embeddings")),
    ("invalid_request", _with("url", ["/v1/completions"])),
    ("model_not_found", lambda: chat(model="gpt-4o")),
    ("model_not_found", lambda: completion(model="demo-chat ")),
    ("invalid_request", lambda: chat(messages=[])),
    ("invalid_request", lambda: chat(messages=[{"content": "no role"}])),
    ("invalid_request", lambda: chat(messages="hello")),
    ("invalid_request", lambda: chat(temperature=-1)),
    ("invalid_request", lambda: chat(max_tokens="many")),
    ("invalid_request", lambda: chat(max_tokens=3, max_completion_tokens=4)),
    ("invalid_request", lambda: chat(n=2)),
    ("invalid_request", lambda: chat(seed=-5)),
    ("invalid_request", lambda: completion(prompt="")),
    ("invalid_request", lambda: completion(prompt=[])),
    ("invalid_request", lambda: completion(prompt=[1, -1])),
    ("unsupported_parameter", lambda: completion(prompt=["a", "b"])),
    ("unsupported_parameter", lambda: chat(stream=True)),
    ("unsupported_parameter", lambda: chat(temprature=1)),
    ("unsupported_parameter", lambda: completion(echo=True)),
    ("unsupported_parameter", lambda: completion(suffix="end")),
    ("unsupported_parameter", lambda: completion(max_completion_tokens=3)),
    ("unsupported_parameter", lambda: chat(tool_choice="required")),
    (ROW_FAILED, lambda: chat(messages=[{"role": "user", "content": "long " * 200}])),
    (ROW_FAILED, lambda: completion(prompt=[9999])),
]  # fmt: skip


def make_batch(num_lines: int, seed: int = 7) -> tuple[bytes, list[Expected]]:
    """A file of `num_lines` lines, about half of them good, and what must become of each."""
    draw = random.Random(seed)
    lines: list[bytes] = []
    expected: list[Expected] = []
    used: list[str] = []
    while len(lines) < num_lines:
        custom_id = f"request-{len(lines)}" if draw.random() < 0.8 else f"Anfrage \"{len(lines)}\"\n ü"
        kind = draw.random()
        if kind < 0.55:
            line, code = GOOD[len(lines) % len(GOOD)](), RESPONSE
        elif kind < 0.85:
            code, make = BAD[len(lines) % len(BAD)]
            line = make()
        elif kind < 0.90 and used:
            # A second line with a custom_id that is taken, by whatever kind of line.
            custom_id, line, code = draw.choice(used), chat(), "duplicate_custom_id"
        else:
            raw, entry = _broken(draw.randrange(6), custom_id)
            lines.append(raw)
            expected.append(entry)
            if entry[0] is not None:
                used.append(entry[0])
            continue
        line["custom_id"] = custom_id
        lines.append(json.dumps(line, ensure_ascii=draw.random() < 0.5).encode())
        expected.append((None if code == "duplicate_custom_id" else custom_id, code))
        used.append(custom_id)
    return b"\n".join(lines) + b"\n", expected


def _broken(kind: int, custom_id: str) -> tuple[bytes, Expected]:
    whole = json.dumps(chat() | {"custom_id": custom_id}).encode()
    if kind == 0:
        return whole[:-3], (custom_id, "invalid_json")
    if kind == 1:
        return whole[:12], (None, "invalid_json")
    if kind == 2:
        return whole.replace(b"1+2=", b"\xff\xfe"), (custom_id, "invalid_json")
    if kind == 3:
        return b"[1, 2]", (None, "invalid_json")
    if kind == 4:
        return json.dumps(chat() | {"custom_id": 17}).encode(), (None, "missing_required_parameter")
    return json.dumps(chat()).encode(), (None, "missing_required_parameter")
