"""Token ids and text equal those of transformers' AutoTokenizer on the same folder."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from hpcinfer.data.tokenize import Tokenizer
from hpcinfer.errors import CheckpointError, RowError

CORPUS = ["hello world . this is a test , don't you know ?", "prompts and generations, löng wörds", "1 + 2 = 3"] * 5
TEXTS = [
    "hello world",
    "this is  a test!",
    "ünïcode 第三 🙂 \n\t end ",
    "<s>special</s> inside",
    "a  <pad> b <|im|> c",
    " leading",
    "",
    "don't",
    "x" * 500,
]


def byte_level() -> Library:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(CORPUS, trainer)
    return library


def word_piece() -> Library:
    library = Library(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.Lowercase()
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "<s>", "</s>"], show_progress=False)
    library.train_from_iterator(CORPUS, trainer)
    return library


def unigram() -> Library:
    library = Library(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    library.train_from_iterator(CORPUS, trainer)
    return library


def folder(path, library: Library, config: dict) -> str:
    path.mkdir(exist_ok=True)
    library.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", **config}))
    return str(path)


@pytest.mark.parametrize("build", [byte_level, word_piece, unigram])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": False},
        {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True},
        {"clean_up_tokenization_spaces": True},
        {"pad_token": {"__type": "AddedToken", "content": "<pad>", "lstrip": True}, "extra_special_tokens": ["<|im|>"]},
    ],
)
@pytest.mark.parametrize("with_bos", [True, False])
def test_equal_to_transformers(tmp_path, build, config, with_bos):
    transformers = pytest.importorskip("transformers")
    library = build()
    if build is not byte_level:
        # transformers rebuilds the Llama class from its vocabulary, which fits no other kind of tokenizer.
        config = {**config, "tokenizer_class": "PreTrainedTokenizerFast"}
    if with_bos:
        ids = [(token, library.token_to_id(token)) for token in ("<s>", "</s>")]
        library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=ids)
    path = folder(tmp_path / "model", library, config)
    reference = transformers.AutoTokenizer.from_pretrained(path)
    mine = Tokenizer(path)
    expected = [reference(text)["input_ids"] for text in TEXTS]
    assert [ids.tolist() for ids in mine.encode_batch(TEXTS)] == expected
    assert [mine.encode(text).tolist() for text in TEXTS] == expected
    assert mine.decode_batch(expected) == [reference.decode(ids, skip_special_tokens=True) for ids in expected]
    some = np.random.default_rng(0).integers(0, len(reference), 40).tolist()
    assert mine.decode(np.array(some, np.int32)) == reference.decode(some, skip_special_tokens=True)
    assert mine.vocab_size == len(reference)
    assert mine.special_token_id("eos_token") == reference.eos_token_id


def test_padding_and_truncation_of_the_file_are_switched_off(tmp_path):
    library = byte_level()
    library.enable_truncation(3)
    library.enable_padding(length=700)
    mine = Tokenizer(folder(tmp_path, library, {}))
    library.no_truncation()
    library.no_padding()
    assert [len(ids) for ids in mine.encode_batch(TEXTS)] == [len(library.encode(text).ids) for text in TEXTS]


def test_a_bad_text_is_its_own_error(tmp_path):
    mine = Tokenizer(folder(tmp_path, byte_level(), {}))
    results = mine.encode_batch(["good", "lone \ud800", "good"])
    assert results[0].tolist() == results[2].tolist() == mine.encode("good").tolist()
    assert isinstance(results[1], RowError)
    with pytest.raises(RowError):
        mine.encode("lone \ud800")


def test_dtype_and_empty_batch(tmp_path):
    mine = Tokenizer(folder(tmp_path, byte_level(), {}))
    assert mine.encode("hello").dtype == np.int32
    assert mine.encode_batch([]) == [] and mine.decode_batch([]) == []
    assert mine.decode([]) == "" and mine.decode([10**6]) == ""
    assert mine.token_id("<s>") == 0 and mine.token_id("no such") is None


def test_no_tokenizer_says_that_prompts_must_be_token_ids(tmp_path):
    with pytest.raises(CheckpointError, match="token ids"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"model": {"type": "BPE"}}', b"[" * 5000])
def test_damaged_files(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["not json", "[]", "[" * 10000])
def test_damaged_config(tmp_path, content):
    folder(tmp_path, byte_level(), {})
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError):
        Tokenizer(tmp_path)
