"""The generations file: what is written is read, and what is damaged is found."""

from __future__ import annotations

import errno
import json
import random
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.data.generation_table import GenerationTable, Ragged
from hpcinfer.data.generations import GenerationFile, encode_generations
from hpcinfer.errors import DataError
from hpcinfer.request import FinishReason, Generation, Status


def generation(
    row: int, sample: int = 0, text: str = "ä text", tokens: int = 3, status: Status = Status.OK
) -> Generation:
    return Generation(
        row=row, sample=sample, status=status, finish_reason=FinishReason.STOP,
        token_ids=np.arange(tokens, dtype=np.int32), text=text, num_prompt_tokens=7,
        error="why" if status is Status.FAILED else "",
    )


def equal(one: Generation, other: Generation) -> bool:
    return (
        one.key == other.key and one.status == other.status and one.finish_reason == other.finish_reason
        and one.text == other.text and one.error == other.error and one.num_prompt_tokens == other.num_prompt_tokens
        and np.array_equal(one.token_ids, other.token_ids)
    )


def write(path: Path, generations: list[Generation]) -> Path:
    path.write_bytes(encode_generations(generations, "uuid"))
    return path


@pytest.mark.parametrize("count", [0, 1, 2, 5000])
def test_round_trip_sorted(tmp_path: Path, count: int) -> None:
    rows = [generation(i * 7919 % 5003, i % 3, "x" * (i % 50), i % 20, Status(i % 3)) for i in range(count)]
    with GenerationFile(write(tmp_path / "f.h5", rows)) as file:
        file.validate()
        found = list(file)
        assert file.run_uuid == "uuid" and not file.complete and len(file) == count
        for expected, got in zip(sorted(rows, key=lambda g: g.key), found, strict=True):
            assert equal(expected, got)
        for expected in rows[:20]:
            assert equal(file.find(*expected.key), expected)
        assert file.find(10**6) is None
        assert file.rows().dtype == np.uint64
        assert file.samples().dtype == np.uint16
        assert file.statuses().dtype == np.uint8


def test_stored_form(tmp_path: Path) -> None:
    """What the schema page promises to readers in other languages."""
    with h5py.File(write(tmp_path / "f.h5", [generation(2**40, 65535)])) as file:
        assert (file.attrs["format"], file.attrs["version"], file.attrs["complete"]) == ("hpcinfer-generations", 1, 0)
        dtypes = {name: dataset.dtype.str for name, dataset in file["generations"].items()}
        assert dtypes == {
            "row": "<u8", "sample": "<u2", "finish_reason": "|u1", "n_prompt_tokens": "<i4", "n_output_tokens": "<i4",
            "status": "|u1", "text": "|u1", "text_offsets": "<i8", "token_ids": "<i4", "token_offsets": "<i8",
            "error": "|u1", "error_offsets": "<i8",
        }
        assert json.loads(file["generations/status"].attrs["enum"]) == {"ok": 0, "failed": 1, "partial": 2}
        assert json.loads(file["generations/finish_reason"].attrs["enum"])["length"] == 2


def test_large_rows_come_in_small_tables(tmp_path: Path) -> None:
    with GenerationFile(write(tmp_path / "f.h5", [generation(row, text="y" * 1000) for row in range(100)])) as file:
        sizes = [len(table) for table in file.tables(max_rows=50, max_bytes=10_000)]
    assert sum(sizes) == 100 and max(sizes) <= 10
    with GenerationFile(tmp_path / "f.h5") as file:
        assert [len(table) for table in file.tables(max_bytes=1)] == [1] * 100


def test_every_flipped_bit_is_found_or_harmless(tmp_path: Path) -> None:
    rows = [generation(row, text=f"text {row}") for row in range(40)]
    image = encode_generations(rows, "uuid")
    rng = random.Random(7)
    num_found = 0
    for _ in range(300):
        damaged = bytearray(image)
        damaged[rng.randrange(len(image))] ^= 1 << rng.randrange(8)
        (tmp_path / "f.h5").write_bytes(damaged)
        try:
            with GenerationFile(tmp_path / "f.h5") as file:
                for expected, got in zip(rows, file, strict=True):
                    assert equal(expected, got)
        except DataError:
            num_found += 1
    assert num_found > 100


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_cut_short(tmp_path: Path, share: float) -> None:
    image = encode_generations([generation(row) for row in range(100)], "uuid")
    (tmp_path / "f.h5").write_bytes(image[: int(len(image) * share)])
    with pytest.raises(DataError), GenerationFile(tmp_path / "f.h5") as file:
        file.validate()


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        GenerationFile(tmp_path / "none.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(DataError, match="not a generations file"):
        GenerationFile(tmp_path / "other.h5")
    tmp_path.joinpath("folder.h5").mkdir()
    with pytest.raises(OSError) as caught:
        GenerationFile(tmp_path / "folder.h5")
    assert caught.value.errno == errno.EISDIR


@pytest.mark.parametrize("fault", ["falls", "short", "end", "status", "dtype", "missing"])
def test_structure_is_checked(tmp_path: Path, fault: str) -> None:
    path = write(tmp_path / "f.h5", [generation(row) for row in range(5)])
    with h5py.File(path, "r+") as file:
        group = file["generations"]
        if fault == "falls":
            group["text_offsets"][2] = 0
        elif fault == "end":
            group["text_offsets"][5] = 1
        elif fault == "status":
            group["status"][1] = 9
        else:
            values = group["row"][:]
            del group["row"]
            if fault == "short":
                group["row"] = values[:4]
            elif fault == "dtype":
                group["row"] = values.astype("i4")
    with pytest.raises(DataError), GenerationFile(path) as file:
        file.validate()


def test_lone_surrogates_do_not_stop_a_commit(tmp_path: Path) -> None:
    with GenerationFile(write(tmp_path / "f.h5", [generation(0, text="a\ud800b")])) as file:
        assert next(iter(file)).text == "a?b"


@given(st.lists(st.binary(max_size=20), max_size=30), st.data())
def test_ragged_take(values: list[bytes], data: st.DataObject) -> None:
    ragged = Ragged.pack(values, np.dtype("u1"))
    indices = data.draw(st.lists(st.integers(0, len(values) - 1), max_size=40)) if values else []
    taken = ragged.take(np.array(indices, np.int64))
    assert [taken[i].tobytes() for i in range(len(indices))] == [values[i] for i in indices]


KEYS = st.tuples(st.integers(0, 5), st.integers(0, 2), st.sampled_from(Status), st.integers(0, 4))


@given(st.lists(KEYS, min_size=1, max_size=40))
def test_duplicates(rows: list[tuple[int, int, Status, int]]) -> None:
    """Against the rule in words: ok, failed, partial; the longer partial; the first."""
    table = GenerationTable.from_generations(
        [generation(row, sample, f"{i}", tokens, status) for i, (row, sample, status, tokens) in enumerate(rows)]
    )
    expected = {}
    for index, (row, sample, status, tokens) in enumerate(rows):
        preference = (status, -tokens if status is Status.PARTIAL else 0, index)
        expected[row, sample] = min(expected.get((row, sample), preference), preference)
    found = {g.key: int(g.text) for g in table.deduplicated().generations()}
    assert found == {key: preference[2] for key, preference in expected.items()}
    assert list(found) == sorted(found)
