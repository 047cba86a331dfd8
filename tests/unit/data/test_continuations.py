"""Texts that are to follow prompts: read beside them, and tokenised with them."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcinfer.data.prompts.identity import prefix_fingerprint
from hpcinfer.data.prompts.prompts_writer import PromptsWriter
from hpcinfer.data.prompts.reader import open_prompts
from hpcinfer.data.tokenize import Tokenizer
from hpcinfer.errors import DataError, RowError
from tests.checkpoints import write_byte_tokenizer

TEXTS = [("1+1=", "2"), ("Ä", "é!"), ("x", None), ("x", ""), ("x", 7), ("x", ["y"])]


def write(path: Path, rows, kind: str = "text") -> Path:
    with PromptsWriter(path, kind=kind) as writer:
        for prompt, continuation in rows:
            writer.append(prompt, meta={} if continuation is None else {"the answer": continuation})
    return path


def test_they_come_with_their_rows(tmp_path: Path) -> None:
    with open_prompts(write(tmp_path / "p.h5", TEXTS)) as reader:
        assert all(row.continuation is None for row in reader.rows())
        reader.read_continuations("the answer")
        rows = list(reader.rows())
        assert [row.continuation for row in rows] == ["2", "é!", None, None, None, None]
        assert [row.text for row in rows[:2]] == ["1+1=", "Ä"] and list(reader.rows(1, 2)) == rows[1:2]
        assert "no continuation" in rows[2].error and all("not a text, or empty" in row.error for row in rows[3:])


def test_of_token_ids_and_of_shards(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    write(tmp_path / "shards/a.h5", [([1, 2], [3]), ([1], [-1])], kind="token_ids")
    write(tmp_path / "shards/b.h5", [([4], [5, 6]), ([1], "x"), ([1], [])], kind="token_ids")
    with open_prompts(tmp_path / "shards") as reader:
        reader.read_continuations("the answer")
        rows = list(reader.rows())
        assert [row.row for row in rows] == [0, 1, 2, 3, 4]
        assert [None if row.continuation is None else row.continuation.tolist() for row in rows] == [[3], None, [5, 6], None, None]
        assert all("not a list of token ids" in rows[row].error for row in (1, 3, 4))


def test_a_column_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "p.h5", TEXTS)
    with h5py.File(tmp_path / "plain.h5", "w") as file:
        file["text"] = ["a", "b"]
    for name in ("p.h5", "plain.h5"):
        with open_prompts(tmp_path / name) as reader, pytest.raises(DataError, match="no meta column 'answer'") as caught:
            reader.read_continuations("answer")
        assert "--meta-columns answer" in str(caught.value)


def test_other_continuations_are_another_input(tmp_path: Path) -> None:
    found = []
    for name, answer in (("a", "2"), ("b", "3")):
        with open_prompts(write(tmp_path / f"{name}.h5", [("1+1=", answer)])) as reader:
            found.append(prefix_fingerprint(reader, 1))
            reader.read_continuations("the answer")
            found.append(prefix_fingerprint(reader, 1))
    assert found[0] == found[2] and len({*found[1:]}) == 3


def test_prompt_and_continuation_are_tokenised_as_one_text(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    (plain, start), (wide, wide_start), nothing = tokenizer.encode_continued(["1+1=", "Ä", "x"], ["2", "é!", ""])
    assert plain.tolist() == tokenizer.encode("1+1=2").tolist() and plain.dtype == np.int32 and start == 4
    assert wide.tolist() == tokenizer.encode("Äé!").tolist() and wide_start == 2  # Ä has two bytes
    assert isinstance(nothing, RowError)
