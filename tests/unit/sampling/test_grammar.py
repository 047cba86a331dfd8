"""Constraints: what a random walk through their masks writes fulfils them, and what cannot be used says why."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import re
import sys
import threading

import llguidance
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcinfer.data.tokenize import Tokenizer
from hpcinfer.errors import ConfigError, RowError
from hpcinfer.request import END_WITHOUT_TOKEN, NO_TOKEN_LEFT, Constraint
from hpcinfer.sampling.grammar import Grammars, Matcher
from tests.checkpoints import write_byte_tokenizer
from tests.conftest import ROOT

EOS = 258
DEMO = Tokenizer(ROOT / "datasets/demo-model")  # a byte is its own id
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,6}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
ODD_CHOICES = ['say "x"', "a\\", "two\nlines", "é", "😀", "a/b", "[a-z]", "$(x)", "\t", "\x07", "yes", "yes and no"]


def demo_grammars(vocab_size: int = 263, eos_token_ids: tuple[int, ...] = (EOS,)) -> Grammars:
    return Grammars(lambda: DEMO, vocab_size=vocab_size, eos_token_ids=eos_token_ids)


GRAMMARS = demo_grammars()


def allowed(grammars: Grammars, matcher) -> tuple[int | None, list[int]]:
    words = np.full((1, grammars.mask_words), -1, np.int32)
    (instead,) = grammars.fill([matcher], words)
    return instead, np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()


def walk(constraint: Constraint, seed: int, *, most: int = 400) -> str | None:
    """The text of tokens drawn at random from the masks; None when it does not end within `most` of them."""
    rng = np.random.default_rng(seed)
    matcher = GRAMMARS.matcher(constraint, may_end=True)
    ids: list[int] = []
    while len(ids) < most:
        instead, ids_now = allowed(GRAMMARS, matcher)
        assert instead is None, (matcher.error, bytes(ids))
        token = int(rng.choice(ids_now))
        if token == EOS:
            return bytes(ids).decode()
        matcher.consume([token])
        ids.append(token)
    return None


def is_person(text: str) -> bool:
    """The schema by hand."""
    value = json.loads(text)
    return (
        list(value) == ["name", "age", "tags"] and re.fullmatch("[A-Z][a-z]{1,6}", value["name"]) is not None
        and type(value["age"]) is int and 0 <= value["age"] <= 120
        and 1 <= len(value["tags"]) <= 3 and set(value["tags"]) <= {"red", "green", "blue"}
    )


@pytest.mark.parametrize(
    ("constraint", "holds"),
    [
        (Constraint("json", json.dumps(PERSON)), is_person),
        (Constraint("json", '{"type":"array","items":{"type":"boolean"},"maxItems":4}'),
         lambda text: set(json.loads(text)) <= {True, False}),
        (Constraint("json", '{"type":"object","minProperties":2,"maxProperties":2,"additionalProperties":{"type":"null"}}'),
         lambda text: list(json.loads(text).values()) == [None, None]),
        (Constraint("regex", r"(\d{4})-(\d\d) [a-f]+/\\"), lambda text: re.fullmatch(r"(\d{4})-(\d\d) [a-f]+/\\", text)),
        (Constraint("choice", json.dumps(ODD_CHOICES)), lambda text: text in ODD_CHOICES),
        (Constraint("grammar", 'start: "(" start ")" | "x"'),
         lambda text: re.fullmatch(r"(\(*)x(\)*)", text) and text.count("(") == text.count(")")),
        (Constraint("grammar", 'root ::= "a" root | "b"\n'), lambda text: re.fullmatch("a*b", text)),
    ],
    ids=lambda value: value.text[:30] if isinstance(value, Constraint) else "",
)  # fmt: skip
def test_what_masks_let_through_fulfils_the_constraint(constraint, holds):
    texts = {text for seed in range(12) if (text := walk(constraint, seed)) is not None}
    assert len(texts) > 1, texts
    assert all(holds(text) for text in texts), texts


@settings(max_examples=30)
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=6), min_size=1, max_size=6), st.integers(0, 9))
def test_any_texts_can_be_choices(choices, seed):
    constraint = Constraint("choice", json.dumps(choices))
    assert walk(constraint, seed) in choices
    for choice in choices:
        matcher = GRAMMARS.matcher(constraint, may_end=True)
        matcher.consume(list(choice.encode()))
        assert EOS in allowed(GRAMMARS, matcher)[1]


def test_blanks_between_parts_of_json_are_bounded_unless_the_schema_says_otherwise():
    schema = {"type": "array", "items": {"type": "integer"}}
    for blanks, own, goes_on in ((20, {}, True), (21, {}, False), (99, {"x-guidance": {"whitespace_flexible": True}}, True)):
        matcher = GRAMMARS.matcher(Constraint("json", json.dumps(schema | own)), may_end=True)
        matcher.consume(list(b"[1," + b" " * blanks))
        assert (not matcher.error) is goes_on, blanks


def test_the_end_is_allowed_where_the_text_may_end_and_forced_where_it_must():
    matcher = GRAMMARS.matcher(Constraint("regex", "ab?"), may_end=True)
    assert allowed(GRAMMARS, matcher) == (None, [ord("a")])
    matcher.consume([ord("a")])
    assert allowed(GRAMMARS, matcher) == (None, [ord("b"), EOS])
    matcher.consume([ord("b")])
    assert allowed(GRAMMARS, matcher) == (None, [EOS])


@pytest.mark.parametrize(("eos_token_ids", "may_end"), [((EOS,), False), ((), True)])
def test_without_an_end_of_sequence_the_row_goes_on_as_far_as_it_can(eos_token_ids, may_end):
    grammars = demo_grammars(eos_token_ids=eos_token_ids)
    matcher = grammars.matcher(Constraint("regex", "ab?"), may_end=may_end)
    matcher.consume([ord("a")])
    assert allowed(grammars, matcher) == (None, [ord("b")])
    matcher.consume([ord("b")])
    assert allowed(grammars, matcher) == (END_WITHOUT_TOKEN, [])


def test_a_token_that_is_not_allowed_leaves_none():
    matcher = GRAMMARS.matcher(Constraint("regex", "ab"), may_end=True)
    matcher.consume([ord("x")])
    assert allowed(GRAMMARS, matcher)[0] == NO_TOKEN_LEFT
    assert matcher.error


def test_several_ends_of_which_the_tokenizer_lacks_one():
    grammars = demo_grammars(vocab_size=300, eos_token_ids=(EOS, 256, 290))
    matcher = grammars.matcher(Constraint("regex", "a*"), may_end=True)
    assert allowed(grammars, matcher) == (None, [ord("a"), 256, EOS, 290])


@pytest.mark.parametrize("vocab_size", [263, 264, 288, 300, 1000])
def test_rows_of_the_vocabulary_beyond_the_tokenizers_are_never_allowed(vocab_size):
    grammars = demo_grammars(vocab_size=vocab_size)
    matcher = grammars.matcher(Constraint("regex", "(?s).*"), may_end=True)
    instead, ids = allowed(grammars, matcher)
    assert instead is None and grammars.mask_words == -(-vocab_size // 32)
    assert max(ids) == EOS and not {256, 257, 259} & set(ids), "special tokens have no text"


def test_a_vocabulary_that_is_smaller_than_the_tokenizers_has_no_token_beyond_its_own():
    grammars = demo_grammars(vocab_size=100, eos_token_ids=(3,))
    instead, ids = allowed(grammars, grammars.matcher(Constraint("regex", "x|b"), may_end=True))
    assert instead is None and ord("b") in ids
    with pytest.raises(RowError, match="cannot be fulfilled"):
        grammars.check(Constraint("regex", "x"))


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("json", "no json", "Expecting value"), ("json", "[1]", "object or boolean"), ("json", '{"type":"thing"}', "Invalid type: thing"),
        ("json", '{"not":{"type":"string"}}', "Unimplemented keys"), ("json", '{"type":"array","uniqueItems":true}', "uniqueItems"),
        ("json", '{"$ref":"#/a","a":{"$ref":"#/a"}}', "stack level"), ("json", "[" * 100_000, "recursion"),
        ("json", '{"type":"integer","minimum":5,"maximum":3}', "Unsatisfiable"), ("json", '{"$ref":"http://a.b/c"}', "not fetch"),
        ("regex", "(ab", "unclosed group"), ("regex", "(?=a)b", "look-around"), ("regex", r"(a)\1", "backreferences"),
        ("regex", "ab\\", "backslash at the end"), ("regex", r"[^\x00-\U0010FFFF]", "no text of this model"),
        ("grammar", "start: nobody", "unknown name"), ("grammar", "what is this ((", "Failed to convert"), ("grammar", "", "root"),
    ],
)  # fmt: skip
def test_a_constraint_that_cannot_be_used_says_why(kind, text, reason):
    for _ in range(2):  # the second answer comes from those kept
        with pytest.raises(RowError, match=f"structured_{kind}.*{reason}") as error:
            GRAMMARS.check(Constraint(kind, text))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    GRAMMARS.check(Constraint("regex", "fine"))


@pytest.mark.parametrize("depth", [3000, 20000])
@pytest.mark.parametrize("kind", ["json", "grammar"])
def test_a_deep_constraint_does_not_end_the_process(kind, depth):
    """llguidance calls itself for each level."""
    levels = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}, "type": "array"} for i in range(depth)} | {f"d{depth}": {"type": "null"}}
    text = {
        "json": json.dumps({"$defs": levels, "$ref": "#/$defs/d0"}),
        "grammar": "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(depth)) + f'\na{depth}: "x"',
    }[kind]
    try:
        demo_grammars().check(Constraint(kind, text))
    except RowError as error:
        assert "too large" in str(error) or "characters" in str(error)


def test_a_byte_level_tokenizer_with_ids_of_its_own(tmp_path):
    write_byte_tokenizer(tmp_path)
    grammars = Grammars(lambda: Tokenizer(tmp_path), vocab_size=260, eos_token_ids=(2,))
    matcher = grammars.matcher(Constraint("regex", "é|z"), may_end=True)
    assert allowed(grammars, matcher) == (None, sorted([3 + ord("z"), 3 + "é".encode()[0]]))
    matcher.consume([3 + "é".encode()[0]])
    assert allowed(grammars, matcher) == (None, [3 + "é".encode()[1]])


def test_a_tokenizer_of_another_kind_is_a_reason_of_the_row(tmp_path):
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models

    library = Library(models.WordPiece(vocab={"a": 0, "##b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    library.decoder = decoders.WordPiece()
    library.save(str(tmp_path / "tokenizer.json"))
    grammars = Grammars(lambda: Tokenizer(tmp_path), vocab_size=3, eos_token_ids=(2,))
    with pytest.raises(RowError, match="does not work with this model's tokenizer.*WordPiece"):
        grammars.check(Constraint("regex", "a"))


def test_without_a_tokenizer_or_llguidance(monkeypatch):
    grammars = Grammars(lambda: None, vocab_size=263, eos_token_ids=(EOS,))
    with pytest.raises(RowError, match=r"no tokenizer\.json"):
        grammars.check(Constraint("regex", "a"))
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r"hpcinfer\[structured\]"):
        demo_grammars().check(Constraint("regex", "a"))


def test_constraints_are_compiled_once(monkeypatch):
    import llguidance

    compiled = []
    real = llguidance.LLMatcher.grammar_from_regex
    monkeypatch.setattr("hpcinfer.sampling.grammar._FORMS", {"regex": lambda module, text: compiled.append(text) or real(text)})
    grammars = demo_grammars()
    for text in ("a", "b", "a", "a"):
        grammars.check(Constraint("regex", text))
    assert compiled == ["a", "b"]
    first, second = (grammars.matcher(Constraint("regex", "a"), may_end=True) for _ in range(2))
    first.consume([ord("a")])
    assert allowed(grammars, second) == (None, [ord("a")]), "matchers of one constraint are apart"


def test_masks_are_filled_while_another_thread_compiles(monkeypatch):
    """A large constraint of a coming row must not hold up the rows in work."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(module, text):
        if text == "slow":
            begun.set()
            assert go_on.wait(20)
        return module.LLMatcher.grammar_from_regex(text)

    monkeypatch.setattr("hpcinfer.sampling.grammar._FORMS", {"regex": slow})
    grammars = demo_grammars()
    grammars.check(Constraint("regex", "a"))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        compiling = pool.submit(grammars.check, Constraint("regex", "slow"))
        assert begun.wait(20)
        filled = pool.submit(lambda: allowed(grammars, grammars.matcher(Constraint("regex", "a"), may_end=True)))
        try:
            assert filled.result(timeout=10) == (None, [ord("a")]) and not compiling.done()
        finally:
            go_on.set()
        compiling.result(timeout=20)


def test_what_others_have_written_uses_no_row_up(monkeypatch):
    """Matchers share an automaton of bounded size: rows that come when it is full are as good as the first one."""
    monkeypatch.setattr(llguidance, "LLParserLimits", functools.partial(llguidance.LLParserLimits, max_lexer_states=600))
    grammars, rng = demo_grammars(), np.random.default_rng(1)
    constraint = Constraint("regex", "([ab]*a[ab]{12})+")
    matchers = [grammars.matcher(constraint, may_end=True) for _ in range(3)]
    for _ in range(40):
        for matcher in matchers:
            matcher.consume(rng.choice([97, 98], 50).tolist())
            instead, ids = allowed(grammars, matcher)
            assert instead is None and {97, 98} <= set(ids)
        matchers = [grammars.matcher(constraint, may_end=True) for _ in range(3)]


def test_a_constraint_whose_first_step_takes_all_there_is_says_so(monkeypatch):
    """As "(a{800}){800}" does, in seconds: its first mask can be filled once, and by no copy."""
    monkeypatch.setattr(Matcher, "error", property(lambda matcher: "lexer error: too many expressions constructed"))
    with pytest.raises(RowError, match="structured_regex cannot be used: lexer error: too many"):
        demo_grammars().check(Constraint("regex", "a"))
