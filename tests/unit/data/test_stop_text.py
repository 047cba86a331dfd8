"""Stop texts: found as tokens come exactly where the text of all tokens has one for the first time, whatever the tokenizer."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from hpcinfer.data.stop_text import StopTexts, final_text, find_stop, stop_in
from hpcinfer.data.tokenize import Tokenizer
from hpcinfer.request import SamplingParams

CORPUS = ["hello world . this is a test , don't you know ?", "löng wörds and 第三 things\n\nEND of it", "1 + 2 = 3"] * 5
TEXTS = ("hello world, don't END\n\nthe 第三三三三三三三三 🙂🙂🙂 wörds END. END", "a b  c \n\n x", "🙂第ö" * 12 + "END")


def byte_level() -> Library:
    """As GPT-2, Llama 3 and Qwen."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(CORPUS, trainer)
    return library


def byte_fallback() -> Library:
    """As Llama 2 and Mistral: a space at the start is stripped, a run of bytes that is no text is broken as a whole."""
    letters = [*sorted({*"".join(CORPUS).replace(" ", "▁")} - {*"第三\n"}), "he", "ll", "ST", "▁w", "▁wo"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [("h", "e"), ("l", "l"), ("▁", "w"), ("▁w", "o")]
    library = Library(models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["<s>", "</s>"])
    return library


def word_piece() -> Library:
    """Its decoder takes spaces out again, so that a text may be complete without a new last character."""
    library = Library(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.Lowercase()
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.decoder = decoders.WordPiece(cleanup=True)
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[UNK]", "<s>", "</s>"], show_progress=False)
    library.train_from_iterator(CORPUS, trainer)
    return library


def cleaned_up() -> Library:
    """With `clean_up_tokenization_spaces`, as T5 and XLM-R: " ." becomes "." wherever the two were cut apart."""
    letters = sorted({*"".join(CORPUS).replace(" ", "▁"), "▁"})
    library = Library(models.Unigram([("<unk>", 0.0), *((letter, -2.0) for letter in letters), ("▁.", -1.0), ("▁n't", -1.0)], unk_id=0))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    return library


@pytest.fixture(scope="module", params=[byte_level, byte_fallback, word_piece, cleaned_up], ids=lambda build: build.__name__)
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    request.param().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"clean_up_tokenization_spaces": request.param is cleaned_up}))
    return Tokenizer(folder)


def first_hit(tokenizer: Tokenizer, ids: list[int], sampling: SamplingParams) -> int | None:
    """The number of tokens at which the text of all of them has a stop text for the first time."""
    return next((n for n in range(1, len(ids) + 1) if stop_in(tokenizer, ids[:n], sampling)[1]), None)


def watched(tokenizer: Tokenizer, ids: list[int], sampling: SamplingParams, start: int = 0) -> int | None:
    watch = StopTexts(tokenizer).watch(sampling, ids[:start])
    return next((n for n in range(start + 1, len(ids) + 1) if watch.add(ids[n - 1])), None)


@settings(max_examples=120)
@given(data=st.data())
def test_found_at_the_first_token_that_completes_one_and_again_after_any_resume(tokenizer, data):
    pieces = st.one_of(
        st.sampled_from(TEXTS).map(lambda text: tokenizer.encode_plain(text).tolist()),
        st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=12),
    )
    ids = sum(data.draw(st.lists(pieces, min_size=1, max_size=4)), [])
    text = tokenizer.decode(ids).replace("\ufffd", "")
    starts = st.integers(0, max(0, len(text) - 1))
    parts = st.tuples(starts, st.integers(1, 6)).map(lambda cut: text[cut[0] : cut[0] + cut[1]]).filter(bool)
    stops = data.draw(st.lists(st.one_of(parts, st.sampled_from(["END", "\n\n", "。", "zz"])) if text else st.just("zz"), min_size=1, max_size=3))
    sampling = SamplingParams(stop=stops, min_tokens=data.draw(st.sampled_from([0, 0, 3, 20])))
    wanted = first_hit(tokenizer, ids, sampling)
    assert watched(tokenizer, ids, sampling) == wanted
    last = len(ids) if wanted is None else wanted - 1
    assert watched(tokenizer, ids, sampling, data.draw(st.integers(0, last))) == wanted


@pytest.mark.parametrize(
    ("text", "stops", "after", "hit"),
    [
        ("one two", ["two", "one"], 0, (0, 3)), ("one two", ["x"], 0, None), ("abcd", ["bcd", "c"], 0, (2, 3)), ("abc", ["c", "bc"], 0, (1, 3)),
        ("END END", ["END"], 3, (4, 7)), ("END", ["END"], 2, (0, 3)), ("aaaa", ["aa"], 3, (2, 4)), ("", ["a"], 0, None),
    ],
)  # fmt: skip
def test_the_stop_text_that_is_complete_first_counts(text, stops, after, hit):
    assert find_stop(text, stops, after) == hit


@pytest.mark.parametrize(
    ("stop", "settings_", "text"),
    [
        ("三", {}, "a第"), ("三", {"include_stop_str_in_output": True}, "a第三"), ("第三", {}, "a"), (["x", "🙂b"], {}, "a第三"),
        ("b", {"min_tokens": 3}, "a第三🙂"), ("a", {"min_tokens": 2}, "a第三🙂b"), ("nothing", {}, "a第三🙂b"),
    ],
)
@pytest.mark.parametrize("tokenizer", [byte_level, byte_fallback], indirect=True)
def test_text_is_cut_between_characters(tokenizer, stop, settings_, text):
    ids = tokenizer.encode_plain("a第三🙂b").tolist()
    assert tokenizer.decode(ids) == "a第三🙂b" and len(ids) > 5
    assert final_text(tokenizer, ids, SamplingParams(stop=stop, **settings_)) == text


@pytest.mark.parametrize("tokenizer", [byte_level, byte_fallback], indirect=True)
@pytest.mark.parametrize("end", ["第三", "🙂三"])
@pytest.mark.parametrize("before", ["", "ö" * 20, "🙂" * 9, "a🙂ö" * 5, "ö第" * 9, "xy" * 15])
def test_characters_of_several_tokens_are_read_from_wherever_reading_begins(tokenizer, before, end):
    ids = tokenizer.encode_plain(before + end).tolist()
    sampling = SamplingParams(stop=[end, "x三"])
    wanted = first_hit(tokenizer, ids, sampling)
    assert wanted == len(ids) and {watched(tokenizer, ids, sampling, start) for start in range(len(ids))} == {wanted}


def test_a_clean_up_across_tokens(tmp_path):
    """Token by token "a .b" is read as "a", "a", "a.", "a.b"."""
    cleaned_up().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"clean_up_tokenization_spaces": true}')
    tokenizer = Tokenizer(tmp_path)
    ids = [tokenizer.token_id(token) for token in ("a", "▁", ".", "o")]
    assert tokenizer.decode(ids) == "a.o"
    for stop, wanted in (("a.", 3), (".o", 4)):
        assert {watched(tokenizer, ids, SamplingParams(stop=stop), start) for start in range(wanted)} == {wanted}


@pytest.mark.parametrize("tokenizer", [byte_level, byte_fallback, word_piece], indirect=True)
def test_a_token_costs_the_same_however_long_the_text_is(tokenizer, monkeypatch):
    """Tokens decoded in all, counted: a fixed number for each token, also where each one might end a stop text or is broken."""
    decoded = []
    decode = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: decoded.append(len(ids)) or decode(self, ids))
    lone_byte = next((i for i in range(tokenizer.vocab_size) if decode(tokenizer, [i]) == "\ufffd"), None)
    for ids, stop in (
        (tokenizer.encode_plain("hello world END " * 200).tolist(), "yD "), (tokenizer.encode_plain("hello world " * 300).tolist(), "never"),
        ([lone_byte] * 1000, "x") if lone_byte is not None else ([], "x"),
    ):
        decoded.clear()
        watched(tokenizer, ids, SamplingParams(stop=stop))
        assert sum(decoded) <= 40 * (len(ids) + 1)
