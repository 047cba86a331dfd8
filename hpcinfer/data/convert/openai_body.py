"""The body of a line of an OpenAI batch: which of its parameters become sampling values, which change nothing, which are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hpcinfer.data.prompts import schema
from hpcinfer.errors import ConfigError, DataError

CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"
URLS = (CHAT_URL, COMPLETIONS_URL)

INVALID_JSON = "invalid_json"
TOO_LONG = "line_too_long"
MISSING = "missing_required_parameter"
INVALID = "invalid_request"
DUPLICATE = "duplicate_custom_id"
MODEL = "model_not_found"
UNSUPPORTED = "unsupported_parameter"

_WITHOUT_EFFECT = frozenset((
    "model", "messages", "prompt", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "parallel_tool_calls", "stream_options", "request_id", "priority",
))  # fmt: skip
_TEMPLATE = frozenset(("tools", "documents", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"))
_CHAT_ONLY = _TEMPLATE | {"tool_choice", "reasoning_effort", "max_completion_tokens", "top_logprobs", "response_format"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,), "echo": (False,), "suffix": ("",), "best_of": (1,), "stop": ([],), "stop_token_ids": ([],), "bad_words": ([],),
    "logit_bias": ({},), "presence_penalty": (0,),
    "frequency_penalty": (0,), "repetition_penalty": (1,), "length_penalty": (1,), "min_tokens": (0,), "ignore_eos": (False,),
    "use_beam_search": (False,), "include_stop_str_in_output": (False,), "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,), "modalities": (["text"],),
    "function_call": ("none",), "functions": ([],),
}  # fmt: skip
"""Parameter -> the values that ask for nothing beyond what happens anyway."""


class Refused(DataError):
    """A line that cannot be run, with the code for the error file."""

    def __init__(self, code: str, problem: str) -> None:
        super().__init__(problem)
        self.code = code


def sampling_of(body: Mapping[str, Any], *, chat: bool, num_samples: int) -> dict[str, Any]:
    """The sampling values that a line gives itself, checked; what it leaves out is the job's.

    Args:
        body: the line's body.
        chat: of a chat completion, not of a completion.
        num_samples: `sampling.n` of the job.
    Raises:
        Refused: a parameter that is not known, not supported, or not valid.
    """
    given: dict[str, Any] = {}
    for name, value in body.items():
        if value is None or name in _WITHOUT_EFFECT or name in _APART or (chat and name in _CHAT_ONLY):
            continue
        if not chat and name in _CHAT_ONLY:
            raise Refused(UNSUPPORTED, f"body.{name} is not a parameter of {COMPLETIONS_URL}")
        if name == "n":
            if value != num_samples:
                raise Refused(INVALID, f"body.n is {schema.shorten(value)}, the job's sampling.n is {num_samples} (convert --samples)")
        elif name == "add_special_tokens":
            if value is not (not chat):
                raise Refused(UNSUPPORTED, f"body.{name} = {schema.shorten(value)} is not supported")
        elif name in schema.SAMPLING_COLUMNS and name not in _OWN_MEANING:
            given[name] = [value] if name == "stop" and isinstance(value, str) else value
        elif any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in _NEUTRAL.get(name, ())):
            continue
        else:
            raise Refused(UNSUPPORTED, f"body.{name} = {schema.shorten(value)} is not supported")
    if chat and body.get("max_completion_tokens") is not None:
        most = body["max_completion_tokens"]
        if given.get("max_tokens", most) != most:
            raise Refused(INVALID, f"body.max_tokens is {given['max_tokens']}, body.max_completion_tokens is {schema.shorten(most)}")
        given["max_tokens"] = most
    given |= _logprobs(body, chat) | _structured(body)
    try:
        return schema.checked_overrides(given)
    except ConfigError as error:
        raise Refused(INVALID, schema.one_line(error)) from error


def _logprobs(body: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    """How many of the most likely tokens to tell: a chat says whether and how many apart, a completion in one number."""
    asked, most = body.get("logprobs"), body.get("top_logprobs") if chat else None
    if asked is None or (chat and asked is False):
        if most:
            raise Refused(INVALID, f"body.top_logprobs is {schema.shorten(most)} without body.logprobs")
        return {}
    if "logprobs" not in schema.SAMPLING_COLUMNS:
        raise Refused(UNSUPPORTED, f"body.logprobs = {schema.shorten(asked)} is not supported")
    if chat and asked is not True:
        raise Refused(INVALID, f"body.logprobs is {schema.shorten(asked)}, neither true nor false")
    return {"logprobs": (most or 0) if chat else asked}


_APART = frozenset(("logprobs", "structured_outputs"))


def _structured(body: Mapping[str, Any]) -> dict[str, Any]:
    """What the answer must look like, as fields of SamplingParams: `response_format` of OpenAI, `structured_outputs` of vLLM."""
    given: dict[str, Any] = {}
    form = body.get("response_format")
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "json_schema":
        inner = form.get("json_schema")
        wanted = inner.get("schema") if isinstance(inner, dict) else None
        if not isinstance(wanted, dict):
            raise Refused(INVALID, f"body.response_format.json_schema.schema is not an object: {schema.shorten(wanted)}")
        given["structured_json"] = json.dumps(wanted)
    elif kind == "json_object":
        given["structured_json"] = json.dumps({"type": "object"})
    elif form is not None and kind != "text":
        raise Refused(UNSUPPORTED, f"body.response_format = {schema.shorten(form)} is not supported")
    more = body.get("structured_outputs")
    if more is not None and not isinstance(more, dict):
        raise Refused(INVALID, f"body.structured_outputs is not an object: {schema.shorten(more)}")
    for name, value in (more or {}).items():
        if value is not None:
            given[f"structured_{name}"] = json.dumps(value) if name == "json" and isinstance(value, dict) else value
    for name in given:
        if name not in schema.SAMPLING_COLUMNS:
            raise Refused(UNSUPPORTED, f"the answer is to be of a given form ({name}), which is not supported")
    return given


_OWN_MEANING = frozenset(("prompt_logprobs",))
"""Fields of SamplingParams whose values have no place in the API's answers."""


def template_arguments(body: Mapping[str, Any]) -> dict[str, Any]:
    """What a chat completion gives its chat template beside the messages. Raises Refused."""
    given = {name: body[name] for name in _TEMPLATE & body.keys() if body[name] is not None}
    more = given.pop("chat_template_kwargs", {})
    if not isinstance(more, dict):
        raise Refused(INVALID, f"body.chat_template_kwargs is not an object: {schema.shorten(more)}")
    choice = body.get("tool_choice")
    if choice == "none":
        given.pop("tools", None)
    elif choice not in (None, "auto"):
        raise Refused(UNSUPPORTED, f"body.tool_choice = {schema.shorten(choice)} is not supported")
    if body.get("reasoning_effort") is not None:
        given["reasoning_effort"] = body["reasoning_effort"]
    return {**more, **given}
