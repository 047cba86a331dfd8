"""Chat messages to the text that a model was trained on, by the Jinja template in its folder, as transformers renders it.

A template is code from wherever the model came from. It runs in jinja2's immutable sandbox, on plain JSON values alone: it
reaches no attribute that could lead out of them, changes none of them, and imports nothing.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcinfer.data.prompts.schema import shorten
from hpcinfer.data.tokenizer_config import read_tokenizer_config, token_text
from hpcinfer.errors import CheckpointError, DataError

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which reasoning travels in messages; templates read one of the first two."""
_CUT = "<<hpcinfer: the message goes on here>>"
_SPACE = " "
"""Follows the cut: where it is gone in the rendered text, the template strips messages, and so must we."""


class ChatTemplate:
    """The chat template of a model folder.

    chat_template.jinja counts before `chat_template` of tokenizer_config.json; additional_chat_templates/*.jinja, and a list in
    tokenizer_config.json, are templates by name, of which "tool_use" is taken for messages with tools and else "default".

    Args:
        model_path: a Hugging Face folder.
    Raises:
        CheckpointError: no template, or one that is not Jinja.
    """

    def __init__(self, model_path: str | os.PathLike) -> None:
        folder = Path(model_path)
        config = read_tokenizer_config(folder)
        sources = _sources(folder, config)
        if not sources:
            raise CheckpointError(
                f"{folder} has no chat template",
                found="neither chat_template.jinja nor chat_template in tokenizer_config.json",
                fix="use the folder of a chat model, or make prompts of text with --prompt-template",
            )
        environment = _environment()
        self._templates = {}
        for name, text in sources.items():
            try:
                self._templates[name] = environment.from_string(text)
            except Exception as error:  # a template is code: whatever compiling it raises, it is the folder's fault
                raise CheckpointError(f"the chat template {name!r} of {folder} is not usable", found=str(error)) from error
        self._special = {
            name: content for name in _SPECIAL_TOKENS if (content := token_text(config.get(name))) is not None
        }

    def render(
        self,
        messages: Any,
        /,
        *,
        tools: Any = None,
        documents: Any = None,
        add_generation_prompt: Any = None,
        continue_final_message: Any = False,
        **variables: Any,
    ) -> str:
        """The text of a chat; it holds the special tokens, so a tokenizer must not add any.

        Args:
            messages: a list of objects with "role"; values that are null are as if not given.
            tools: a list of JSON schemas of functions.
            documents: a list of objects, for templates that know them.
            add_generation_prompt: end with the beginning of the model's answer. Default: unless `continue_final_message`.
            continue_final_message: the last message is the beginning of the answer; nothing closes it.
            variables: more of them; they count before the special tokens of the same names.
        Raises:
            DataError: the messages are not such a list, or the template refuses them.
        """
        messages = _checked_messages(messages)
        _check_objects("tools", tools)
        _check_objects("documents", documents)
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        if continue_final_message and add_generation_prompt:
            raise DataError("add_generation_prompt and continue_final_message exclude each other")
        begun = ""
        if continue_final_message:
            messages, begun = _with_cut(messages)
        if refused := variables.keys() & {"messages", "self"}:
            raise DataError(f"no variable of a chat template may be named {sorted(refused)[0]!r}")
        template = self._template(tools)
        given = {**self._special, **variables}
        given |= {
            "messages": messages, "tools": tools, "documents": documents, "add_generation_prompt": bool(add_generation_prompt)
        }  # fmt: skip
        try:
            text = template.render(given)
        except Exception as error:  # a template is code: it may raise anything
            raise DataError("the chat template refuses the messages", found=str(error) or type(error).__name__) from error
        return _cut(text, begun) if continue_final_message else text

    def _template(self, tools: Any):
        if tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" not in self._templates:
            raise DataError("the model has several chat templates and no default", found=", ".join(sorted(self._templates)))
        return self._templates["default"]


def _sources(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Name -> text of each template; "default" is the one without a name."""
    found: dict[str, str] = {}
    stated = config.get("chat_template")
    if isinstance(stated, str):
        found["default"] = stated
    elif isinstance(stated, list):
        for entry in stated:
            if isinstance(entry, Mapping) and isinstance(entry.get("template"), str):
                found[str(entry.get("name"))] = entry["template"]
    try:
        if (folder / "chat_template.jinja").is_file():
            found["default"] = (folder / "chat_template.jinja").read_text("utf-8")
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            found[path.stem] = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"a chat template of {folder} cannot be read", found=str(error)) from error
    return found


def _environment():
    # Here and not above: most conversions need no templates.
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %} marks what a model is trained on; here its content counts as it is."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

        def _content(self, caller):
            return caller()

    def refuse(message):
        raise jinja2.exceptions.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Jinja's own filter escapes for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    class NoDunders(jinja2.utils.Namespace):
        """namespace() whose attributes cannot be named as Python's inner ones."""

        def __init__(*args, **kwargs):
            for name in dict(*args[1:], **kwargs):
                _refuse_underscore(name)
            jinja2.utils.Namespace.__init__(*args, **kwargs)

        def __setitem__(self, name, value):
            _refuse_underscore(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

    def _refuse_underscore(name):
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace may not have an attribute named {name!r}")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda text: datetime.datetime.now().strftime(text)
    environment.globals["namespace"] = NoDunders
    return environment


def _checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Copies, without nulls, reasoning under both of its names. Raises DataError."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"chat messages are not a list of messages: {shorten(messages)}")
    checked = []
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"message {position} is not an object with a role: {shorten(message)}")
        kept = {key: value for key, value in message.items() if value is not None}
        reasoning = next((kept[name] for name in _REASONING if name in kept), None)
        if reasoning is not None:
            kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
        checked.append(kept)
    return checked


def _check_objects(name: str, values: Any) -> None:
    if values is not None and not (isinstance(values, list) and all(isinstance(one, dict) for one in values)):
        raise DataError(f"{name} is not a list of objects: {shorten(values)}")


def _with_cut(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The messages with a mark at the end of the last one's text, and that text."""
    last = dict(messages[-1])
    content = last.get("content")
    if isinstance(content, list):
        places = [i for i, part in enumerate(content) if isinstance(part, dict) and isinstance(part.get("text"), str)]
        if places:
            part = content[places[-1]]
            last["content"] = [*content]
            last["content"][places[-1]] = {**part, "text": part["text"] + _CUT + _SPACE}
            return [*messages[:-1], last], part["text"]
    elif isinstance(content, str):
        last["content"] = content + _CUT + _SPACE
        return [*messages[:-1], last], content
    raise DataError("the last message has no text that could be continued")


def _cut(text: str, begun: str) -> str:
    place = text.rfind(_CUT)
    if place < 0 or begun.strip() not in text:
        raise DataError("the chat template does not keep the last message as it is, so that it cannot be continued")
    return text[:place] if text.startswith(_SPACE, place + len(_CUT)) else text[:place].rstrip()
