"""Text of generations: what the tokenizers library says to all of their tokens at once, so that no character is ever split."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from hpcinfer.data.tokenize import Tokenizer
from hpcinfer.engine.outcome import generation_of
from hpcinfer.request import FinishReason, Request, SamplingParams
from hpcinfer.scheduler.sequence import EndedSequence

TEXTS = ["naïve café", "第三 の 世界", "🙂🏽 👨‍👩‍👧 flags 🇩🇪", "مرحبا بالعالم", "a  b\n\tc ", "ﬁ ligature é", "plain"]
CORPUS = ["hello world , this is a text", "1 + 2 = 3"] * 5


def byte_level() -> Library:
    """As GPT-2 and Llama 3: every byte is a character of the vocabulary."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False))
    return library


def byte_fallback() -> Library:
    """As sentencepiece in Llama 2: spaces are ▁, and characters that it does not know are bytes such as <0xE7>."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghilnoprstw", "▁a", "te", "▁te", "xt", "▁text"]
    merges = [("▁", "a"), ("t", "e"), ("▁", "te")]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, "x"]))}
    library = Library(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return library


@pytest.fixture(params=[byte_level, byte_fallback], ids=lambda build: build.__name__)
def tokenizers(request, tmp_path: Path) -> tuple[Library, Tokenizer]:
    library = request.param()
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({}))
    return library, Tokenizer(tmp_path)


def text_of(token_ids, tokenizer: Tokenizer) -> str:
    """As the loop makes it of a sequence that ended."""
    request = Request(row=0, prompt_token_ids=np.array([1], np.int32), sampling=SamplingParams())
    ended = EndedSequence(request=request, output_token_ids=np.array(token_ids, np.int32), reason=FinishReason.LENGTH)
    return generation_of(ended, tokenizer).text


@pytest.mark.parametrize("text", TEXTS)
def test_whole_texts_come_back(tokenizers, text):
    library, tokenizer = tokenizers
    token_ids = tokenizer.encode(text).tolist()
    assert token_ids == library.encode(text).ids
    assert text_of(token_ids, tokenizer) == library.decode(token_ids) == text
    assert len(token_ids) > len(text) or text.isascii(), "characters of several tokens are what this is about"


@pytest.mark.parametrize("text", TEXTS)
def test_cut_anywhere_it_is_what_the_library_says(tokenizers, text):
    """An output may end inside a character (max_tokens, a drain); the next life has the whole one."""
    library, tokenizer = tokenizers
    token_ids = tokenizer.encode(text).tolist()
    pieces = [text_of(token_ids[:stop], tokenizer) for stop in range(len(token_ids) + 1)]
    assert pieces == [library.decode(token_ids[:stop]) for stop in range(len(token_ids) + 1)]
    whole = [piece for piece in pieces if "\N{REPLACEMENT CHARACTER}" not in piece]
    assert all(text.startswith(piece) for piece in whole) and whole[-1] == text
    assert len(whole) < len(pieces) or text.isascii()


def test_tokens_that_are_no_text_are_what_the_library_says(tokenizers):
    library, tokenizer = tokenizers
    rng = np.random.default_rng(8)
    rows = [rng.integers(0, library.get_vocab_size(), rng.integers(0, 30)).tolist() for _ in range(200)]
    assert tokenizer.decode_batch(rows) == [library.decode(row) for row in rows]
    assert [text_of(row, tokenizer) for row in rows] == [library.decode(row) for row in rows]
