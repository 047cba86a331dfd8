"""Chat templates: rendered as transformers renders them, and unable to do anything else."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcinfer.data.chat_template import ChatTemplate
from hpcinfer.errors import CheckpointError, DataError, HpcinferError
from tests.conftest import ROOT
from tests.unit.data.chat_templates import STYLES

TOOLS = [{
    "type": "function",
    "function": {
        "name": "weather", "description": "The weather of a town, \"now\" <b>",
        "parameters": {
            "type": "object", "required": ["town"],
            "properties": {
                "town": {"type": "string"}, "unit": {"enum": ["°C", "°F"]}, "days": {"type": "array", "items": {"type": "integer"}},
            },
        },
    },
}]  # fmt: skip
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Kraków", "days": [1]}}}
CHATS = {
    "one": [{"role": "user", "content": "  What is <17> & 25?  "}],
    "turns": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nshort\n</think>\n\nHello "}, {"role": "user", "content": "ü 🙂 {{ 7 }}"},
    ],
    "tools": [
        {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "{\"sky\": \"blue\"}", "name": "weather"},
    ],
    "reasoning": [
        {"role": "user", "content": "a"}, {"role": "assistant", "reasoning": "because", "content": "b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "reasoning_content": "so", "content": "d"},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "look "}, {"type": "image", "url": "x"}]}],
    "wrong turns": [{"role": "assistant", "content": "first"}, {"role": "assistant", "content": "second"}],
}  # fmt: skip


def folder(tmp_path, template, **config):
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, **config}
    if template is not None:
        config["chat_template"] = template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture(scope="module")
def reference():
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "datasets" / "demo-model")
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    return tokenizer


@pytest.mark.parametrize("style", STYLES)
def test_as_transformers_renders(tmp_path, reference, style):
    template = ChatTemplate(folder(tmp_path, STYLES[style]))
    # A day may end between the two.
    variables = [{}, {"enable_thinking": False, "date_string": "1 Jan 2026", "reasoning_effort": "high", "eos_token": "!"}]
    seen = 0
    for messages in CHATS.values():
        for tools in (None, TOOLS):
            for ends in ({}, {"add_generation_prompt": False}, {"continue_final_message": True}):
                for more in variables:
                    seen += _compare(template, reference, STYLES[style], messages, tools, ends, more)
    assert seen > 30


def _compare(template, reference, text, messages, tools, ends, more) -> bool:
    ends_there = {"add_generation_prompt": True, **ends} if "continue_final_message" not in ends else ends
    before = json.dumps(messages)
    try:
        wanted = reference.apply_chat_template(messages, tools=tools, chat_template=text, tokenize=False, **ends_there, **more)
    except Exception:  # whatever transformers refuses
        with pytest.raises(DataError):
            template.render(messages, tools=tools, **ends, **more)
        return False
    assert template.render(messages, tools=tools, **ends, **more) == wanted
    assert json.dumps(messages) == before
    return True


def test_where_templates_are_found(tmp_path):
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(CheckpointError, match="no chat template"):
        ChatTemplate(folder(tmp_path, None))
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}, 3]
    template = ChatTemplate(folder(tmp_path, named))
    assert (template.render(messages), template.render(messages, tools=TOOLS)) == ("d", "t")
    (tmp_path / "chat_template.jinja").write_text("file")
    assert ChatTemplate(tmp_path).render(messages) == "file"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("more")
    assert ChatTemplate(tmp_path).render(messages, tools=TOOLS) == "more"
    with pytest.raises(DataError, match="no default"):
        (tmp_path / "other").mkdir()
        ChatTemplate(folder(tmp_path / "other", [{"name": "rag", "template": "r"}])).render(messages)
    for bad in ("{% if %}", "{{ unclosed", "{% nothing %}"):
        (tmp_path / "chat_template.jinja").write_text(bad)
        with pytest.raises(CheckpointError, match="not usable"):
            ChatTemplate(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="cannot be read"):
        ChatTemplate(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        ChatTemplate(tmp_path)


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['datetime'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace(__class__='x') }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ cycler.__init__.__globals__.os.system('touch PLACE') }}",
    "{{ self._TemplateReference__context }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ ('{0.__cla' ~ 'ss__}') | format(messages) | attr('__class__') }}{{ messages.x.y }}",
    "{{ (messages | attr('__class__')).mro() }}",
    "{{ ['{.__class__}'.format] | map('call', messages) | list }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ messages.append(messages[0]) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ messages.clear() }}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{{ joiner.__init__.__globals__.__builtins__.open('PLACE', 'w') }}",
    "{{ lipsum.__globals__['os'].popen('touch PLACE').read() }}",
]


@pytest.mark.parametrize("text", ESCAPES)
def test_templates_cannot_leave_the_sandbox(tmp_path, text):
    place = tmp_path / "broken-out"
    try:
        template = ChatTemplate(folder(tmp_path, text.replace("PLACE", str(place))))
        rendered = template.render([{"role": "user", "content": "x"}])
    except HpcinferError:
        rendered = ""
    assert not place.exists()
    assert "<class" not in rendered and "root:" not in rendered and "module" not in rendered


def test_messages_are_data(tmp_path):
    template = ChatTemplate(folder(tmp_path, STYLES["marked"]))
    content = "{{ ''.__class__ }}{% for x in y %}${HOME}`id`"
    assert content in template.render([{"role": "user", "content": content}])


BAD_MESSAGES = [None, [], {}, "text", 3, [3], [[]], [{}], [{"role": 3}], [{"content": "x"}]]


@pytest.mark.parametrize("messages", BAD_MESSAGES, ids=repr)
def test_bad_messages(tmp_path, messages):
    with pytest.raises(DataError):
        ChatTemplate(folder(tmp_path, STYLES["turns"])).render(messages, add_generation_prompt=messages is None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "x"]), inner, max_size=4),
    max_leaves=8,
)
ROLES = st.sampled_from(["system", "user", "assistant", "tool"])
NAMES = st.sampled_from(["tools", "documents", "messages", "self", "loop", "bos_token", "add_generation_prompt", "namespace"])


@settings(max_examples=60)
@given(
    style=st.sampled_from(sorted(STYLES)),
    messages=JSON | st.lists(st.builds(lambda role, content: {"role": role, "content": content}, ROLES, JSON), max_size=3),
    more=st.dictionaries(NAMES, JSON, max_size=3),
    goes_on=st.booleans(),
)
def test_any_messages_give_text_or_our_errors(tmp_path_factory, style, messages, more, goes_on):
    if goes_on:
        more["continue_final_message"] = True
    template = ChatTemplate(folder(tmp_path_factory.mktemp("chat"), STYLES[style]))
    try:
        assert isinstance(template.render(messages, **more), str)
    except HpcinferError as error:
        assert str(error)
