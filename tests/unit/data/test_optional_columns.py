"""Log-probabilities, scores and embeddings in generations files: stored, merged, exported, and read by h5py alone."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcinfer.data.export import export, export_jsonl
from hpcinfer.data.generation_table import GenerationTable
from hpcinfer.data.generations import GenerationFile, encode_generations, encode_table
from hpcinfer.data.ledger.commit import commit_bytes
from hpcinfer.data.ledger.coverage import segment_name
from hpcinfer.data.ledger.merge import merge_run
from hpcinfer.data.ledger.run_directory import create_or_open
from hpcinfer.errors import DataError
from hpcinfer.request import Generation, Status, TextScore, TokenLogprobs
from tests.faults.shim.harness import identity


def logprobs(num_tokens: int, num_top: int, seed: int) -> TokenLogprobs:
    rng = np.random.default_rng(seed)
    return TokenLogprobs(
        -rng.random(num_tokens, np.float32), rng.integers(0, 99, (num_tokens, num_top), np.int32),
        -rng.random((num_tokens, num_top), np.float32),
    )


def generation(row: int) -> Generation:
    """Of every kind one after the other; rows 4, 9 ... have nothing optional."""
    fields = [
        {"logprobs": logprobs(row + 1, 0, row)},
        {"logprobs": logprobs(row + 1, 3, row), "prompt_logprobs": logprobs(7, 2, row + 1)},
        {"score": TextScore(-1.5 * row, row)},
        {"embedding": np.arange(row, dtype=np.float32)},
        {"status": Status.FAILED, "error": "why"},
    ][row % 5]
    tokens = np.arange(row + 1, dtype=np.int32)
    return Generation(**{"row": row, "status": Status.OK, "token_ids": tokens, "num_prompt_tokens": 7, **fields})


def same(one: Generation, other: Generation) -> bool:
    def values(generation: Generation) -> list:
        flat = []
        for value in (generation.logprobs, generation.prompt_logprobs):
            flat += [None] if value is None else [value.chosen, value.top_ids, value.top]
        return [*flat, generation.embedding]

    return one.key == other.key and one.score == other.score and all(
        (a is None) == (b is None) and (a is None or (a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")))
        for a, b in zip(values(one), values(other), strict=True)
    )


def test_round_trip(tmp_path: Path) -> None:
    rows = [generation(row) for row in range(40)]
    (tmp_path / "f.h5").write_bytes(encode_generations(rows[::-1], "uuid"))
    with GenerationFile(tmp_path / "f.h5") as file:
        file.validate()
        assert all(same(one, other) for one, other in zip(rows, file, strict=True))
        assert same(file.find(11), rows[11])
        assert [len(table) for table in file.tables(max_bytes=1)] == [1] * 40


def test_a_file_has_the_columns_that_its_rows_need(tmp_path: Path) -> None:
    for rows, optional in (([4], set()), ([0, 4], {"logprobs"}), ([2, 3], {"score", "n_scored_tokens", "perplexity", "embedding"})):
        (tmp_path / "f.h5").write_bytes(encode_generations([generation(row) for row in rows], "uuid"))
        with GenerationFile(tmp_path / "f.h5") as file:
            assert set(file.optional) == optional


def test_h5py_alone_reads_them(tmp_path: Path) -> None:
    rows = [generation(row) for row in range(1, 5)]
    (tmp_path / "f.h5").write_bytes(encode_generations(rows, "uuid"))
    with h5py.File(tmp_path / "f.h5") as file:
        group = file["generations"]

        def row_of(name: str, offsets: str, row: int) -> np.ndarray:
            return group[name][group[offsets][row]:group[offsets][row + 1]]

        np.testing.assert_array_equal(row_of("logprobs", "logprob_offsets", 0), rows[0].logprobs.chosen)
        top = row_of("top_token_ids", "top_token_offsets", 0).reshape(len(rows[0].token_ids), -1)
        np.testing.assert_array_equal(top, rows[0].logprobs.top_ids)
        top = row_of("prompt_top_logprobs", "prompt_top_logprob_offsets", 0).reshape(7, -1)
        np.testing.assert_array_equal(top, rows[0].prompt_logprobs.top)
        np.testing.assert_array_equal(row_of("embedding", "embedding_offsets", 2), rows[2].embedding)
        np.testing.assert_array_equal(group["score"][:], [np.nan, -3.0, np.nan, np.nan])
        np.testing.assert_array_equal(group["n_scored_tokens"][:], [0, 2, 0, 0])
        np.testing.assert_array_equal(group["perplexity"][:], [np.nan, math.exp(1.5), np.nan, np.nan])
        dtypes = {name: dataset.dtype.str for name, dataset in group.items() if name.startswith(("prompt_", "emb", "sc", "perp"))}
        assert set(dtypes.values()) == {"<f4", "<i4", "<i8", "<f8"}


def test_segments_of_different_columns_merge(tmp_path: Path) -> None:
    run = create_or_open(tmp_path / "run", identity(40))
    rows = [generation(row) for row in range(40)]
    for kind in range(5):
        image = encode_generations(rows[kind::5], run.uuid)
        commit_bytes(run.segments, segment_name("a" * 16, kind), image)
    assert merge_run(run, 40, range_bytes=512).complete
    with GenerationFile(run.generations) as file:
        assert all(same(one, other) for one, other in zip(rows, file, strict=True))
    tables = []
    for kind in range(5):
        with GenerationFile(run.segments / segment_name("a" * 16, kind)) as file:
            tables.append(file.table())
    compacted = GenerationTable.concatenate(tables).deduplicated()
    assert all(same(one, other) for one, other in zip(rows, compacted.generations(), strict=True))
    assert encode_table(compacted, "uuid") == encode_generations(rows, "uuid")


def test_a_column_of_another_dtype_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "f.h5").write_bytes(encode_generations([generation(0)], "uuid"))
    with h5py.File(tmp_path / "f.h5", "a") as file:
        del file["generations/logprobs"]
        file["generations/logprobs"] = np.zeros(1)
    with pytest.raises(DataError, match="logprobs must be float32"):
        GenerationFile(tmp_path / "f.h5")


def test_export(tmp_path: Path) -> None:
    rows = [generation(row) for row in range(5)]
    unknown = TokenLogprobs.empty(1, 2).followed_by(rows[1].prompt_logprobs)
    rows[1] = dataclasses.replace(rows[1], prompt_logprobs=unknown)
    (tmp_path / "f.h5").write_bytes(encode_generations(rows, "uuid"))
    export_jsonl(tmp_path / "f.h5", tmp_path / "f.jsonl")
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    assert len({tuple(line) for line in lines}) == 1, "every line has the same keys"
    assert lines[0]["logprobs"] == rows[0].logprobs.chosen.tolist() and lines[0]["top_logprobs"] is None
    assert lines[1]["top_token_ids"] == rows[1].logprobs.top_ids.tolist()
    assert lines[1]["prompt_logprobs"][0] is None and lines[1]["prompt_top_logprobs"][0] == [None, None]
    assert lines[1]["prompt_logprobs"][1:] == rows[1].prompt_logprobs.chosen[1:].tolist()
    assert (lines[2]["score"], lines[2]["n_scored_tokens"], lines[2]["perplexity"]) == (-3.0, 2, math.exp(1.5))
    assert lines[3]["embedding"] == [0.0, 1.0, 2.0] and lines[4]["embedding"] is None and lines[4]["score"] is None


def test_export_of_tables(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = [generation(row) for row in range(5)]
    (tmp_path / "f.h5").write_bytes(encode_generations(rows, "uuid"))
    export(tmp_path / "f.h5", tmp_path / "f.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "f.parquet").to_pylist()
    assert np.array_equal(np.array(table[1]["top_logprobs"], np.float32), rows[1].logprobs.top)
    assert table[1]["prompt_top_token_ids"] == rows[1].prompt_logprobs.top_ids.tolist()
    assert (table[2]["score"], table[2]["n_scored_tokens"], table[2]["perplexity"]) == (-3.0, 2, math.exp(1.5))
    assert table[3]["embedding"] == [0.0, 1.0, 2.0] and table[0]["embedding"] is None and table[4]["logprobs"] is None
    export(tmp_path / "f.h5", tmp_path / "f.csv")
    with open(tmp_path / "f.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert json.loads(lines[1]["top_token_ids"]) == rows[1].logprobs.top_ids.tolist() and lines[0]["score"] == ""
    assert float(lines[2]["perplexity"]) == math.exp(1.5)
