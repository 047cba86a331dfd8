"""Converter of OpenAI batch files: one request a line, {"custom_id", "method", "url", "body"}."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from typing import Any

from hpcinfer.data.chat_template import ChatTemplate
from hpcinfer.data.convert import openai_body as api
from hpcinfer.data.convert.base import Converter, ConvertOptions, Record, Reject, refuse_prompt_options, register
from hpcinfer.data.convert.columns import check_token_ids, raw_text
from hpcinfer.data.convert.lines import decode_object
from hpcinfer.data.convert.openai_body import Refused
from hpcinfer.data.convert.sources import bounded_lines
from hpcinfer.data.prompts import schema
from hpcinfer.errors import DataError, UsageError

META = "openai"
"""The meta column that `export --format openai` needs: {"url", "model"} of each line."""

_CUSTOM_ID = re.compile(rb'"custom_id"\s*:\s*("(?:[^"\\\x00-\x1f]|\\.){1,512}")')


@register
class OpenAiBatch(Converter):
    """Chat completions and completions. With a model folder, which chat lines need, prompts are token ids; without, text.

    Every custom_id is given away once: a second line with it is refused, and carries none. Memory: 16 bytes, and Python's
    overhead of about 80, a line.
    """

    name = "openai"

    def __init__(self, options: ConvertOptions) -> None:
        super().__init__(options)
        refuse_prompt_options(options, self.name)
        self._chat: ChatTemplate | None = None
        self._seen: set[bytes] = set()
        names = options.served_model_names
        if not names and options.model:
            folder = os.path.normpath(options.model)
            names = (options.model, folder, os.path.basename(folder))
        self._models = frozenset(names)
        self._any_model = not names or "*" in names

    def records(self, source: str) -> Iterator[Record | Reject]:
        """Yields a Record or a Reject a line; empty lines pass."""
        for number, line in bounded_lines(source, self.options.max_line_bytes):
            if line is None:
                yield Reject(number, f"the line is longer than {self.options.max_line_bytes} bytes", code=api.TOO_LONG)
            elif line and not line.isspace():
                yield self._item(number, line)

    def _item(self, number: int, line: bytes) -> Record | Reject:
        raw, custom_id = raw_text(line), None
        try:
            try:
                values = decode_object(line)
            except DataError as error:
                custom_id = self._recovered(line)
                raise Refused(api.INVALID_JSON, schema.one_line(error)) from error
            stated = values.get("custom_id")
            if not isinstance(stated, str) or not stated:
                raise Refused(api.MISSING, f"custom_id is not a text: {schema.shorten(stated)}")
            if not self._is_new(stated):
                raise Refused(api.DUPLICATE, f"an earlier line has the custom_id {schema.shorten(stated)}")
            custom_id = stated
            return self._record(number, values, raw)
        except DataError as error:
            code = error.code if isinstance(error, Refused) else api.INVALID
            return Reject(number, schema.one_line(error), raw, custom_id, code)

    def _is_new(self, custom_id: str) -> bool:
        digest = hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        is_new = digest not in self._seen
        self._seen.add(digest)
        return is_new

    def _recovered(self, line: bytes) -> str | None:
        """The custom_id of a line that is not JSON, where it can still be read and nobody has it."""
        match = _CUSTOM_ID.search(line)
        try:
            custom_id = json.loads(match.group(1)) if match else None
        except ValueError:
            return None
        return custom_id if custom_id and self._is_new(custom_id) else None

    def _record(self, number: int, values: dict[str, Any], raw: str) -> Record:
        method, url, body = values.get("method"), values.get("url"), values.get("body")
        if method != "POST":
            raise Refused(api.INVALID, f'method is {schema.shorten(method)}, not "POST"')
        if url not in api.URLS:
            raise Refused(api.INVALID, f"url is {schema.shorten(url)}, not one of {', '.join(api.URLS)}")
        if not isinstance(body, dict):
            raise Refused(api.MISSING, f"body is not an object: {schema.shorten(body)}")
        model = body.get("model")
        if not isinstance(model, str) or not model:
            raise Refused(api.MISSING, f"body.model is not a text: {schema.shorten(model)}")
        if not self._any_model and model not in self._models:
            known = ", ".join(sorted(self._models))
            raise Refused(api.MODEL, f"the model {schema.shorten(model)} is not served; known: {known}")
        chat = url == api.CHAT_URL
        overrides = api.sampling_of(body, chat=chat, num_samples=self.options.num_samples)
        prompt = self._chat_prompt(body) if chat else _prompt(body)
        return Record(
            number, prompt, values["custom_id"], overrides or None, {META: {"url": url, "model": model}}, raw, rendered=chat
        )

    def _chat_prompt(self, body: dict[str, Any]) -> str:
        if body.get("messages") is None:
            raise Refused(api.MISSING, "body.messages is missing")
        if self._chat is None:
            if not self.options.model:
                raise UsageError("chat completions need the model's chat template", fix="give --model FOLDER")
            self._chat = ChatTemplate(self.options.model)
        return self._chat.render(body["messages"], **{**self.options.chat_template_args, **api.template_arguments(body)})


def _prompt(body: dict[str, Any]) -> str | list[int]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise Refused(api.MISSING, f"body.prompt is neither text nor a list of token ids: {schema.shorten(prompt)}")
    if prompt and isinstance(prompt[0], str | list):
        raise Refused(api.UNSUPPORTED, f"body.prompt holds {len(prompt)} prompts; give each a line of its own")
    check_token_ids(prompt)
    return prompt
