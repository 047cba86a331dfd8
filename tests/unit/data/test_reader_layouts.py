"""Each layout of prompts, what is wrong with files as a whole, and telling one input from another."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from hpcinfer.data.prompts import foreign, packed
from hpcinfer.data.prompts.prompts_writer import PromptsWriter
from hpcinfer.data.prompts.reader import check_identity, input_identity, open_prompts, prefix_fingerprint, sampling_for
from hpcinfer.errors import DataError, HpcinferError, RowError, RunDirectoryError
from hpcinfer.request import SamplingParams

TEXTS = ["first", "zweiter: ü", "第三", "x" * 300]


def write_packed(path, rows, group="prompts", **columns):
    blobs = [row if isinstance(row, bytes) else row.encode() for row in rows]
    with h5py.File(path, "w") as file:
        file[f"{group}/data"] = np.frombuffer(b"".join(blobs), np.uint8)
        file[f"{group}/offsets"] = np.cumsum([0] + [len(blob) for blob in blobs])
        for name, values in columns.items():
            file[name] = values
    return path


def read(path, dataset=None):
    with open_prompts(path, dataset) as reader:
        return list(reader.rows())


def test_data_and_offsets_alone_are_enough(tmp_path):
    path = write_packed(tmp_path / "p.h5", TEXTS)
    assert [row.text for row in read(path)] == TEXTS
    assert [row.row for row in read(path)] == [0, 1, 2, 3]


def test_packed_under_another_name(tmp_path):
    path = write_packed(tmp_path / "p.h5", TEXTS, group="my/texts")
    for dataset in (None, "my/texts", "my/texts/data", "/my/texts"):
        assert [row.text for row in read(path, dataset)] == TEXTS


@pytest.mark.parametrize("name", ["text", "prompt", "deep/er/words"])
def test_variable_length_strings(tmp_path, name):
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file.create_dataset(name, data=TEXTS, dtype=h5py.string_dtype())
    assert [row.text for row in read(tmp_path / "p.h5")] == TEXTS
    assert [row.text for row in read(tmp_path / "p.h5", name)] == TEXTS


def test_fixed_length_strings(tmp_path):
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["text"] = np.array([text.encode() for text in TEXTS[:3]])
    assert [row.text for row in read(tmp_path / "p.h5")] == TEXTS[:3]


def test_string_blocks_grow_and_shrink(tmp_path, monkeypatch):
    monkeypatch.setattr(foreign, "BLOCK_BYTES", 4096)
    texts = [f"{n}" * (1 + n % 97) for n in range(2000)]
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file.create_dataset("text", data=texts, dtype=h5py.string_dtype())
    assert [row.text for row in read(tmp_path / "p.h5")] == texts


def test_variable_length_token_ids(tmp_path):
    with h5py.File(tmp_path / "p.h5", "w") as file:
        dataset = file.create_dataset("tokens", (3,), h5py.vlen_dtype(np.int32))
        dataset[0], dataset[1] = [1, 2, 3], [4]
    rows = read(tmp_path / "p.h5", "tokens")
    assert rows[0].token_ids.tolist() == [1, 2, 3] and rows[1].token_ids.tolist() == [4]
    assert "empty" in rows[2].error


def test_padded_ids_with_a_mask(tmp_path):
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["train/input_ids"] = np.array([[5, 6, 0], [0, 0, 7], [0, 0, 0], [1, -2, 0]])
        file["train/attention_mask"] = np.array([[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 1, 0]], np.uint8)
    for dataset in (None, "train", "train/input_ids"):
        rows = read(tmp_path / "p.h5", dataset)
        assert rows[0].token_ids.tolist() == [5, 6] and rows[1].token_ids.tolist() == [7]
        assert "empty" in rows[2].error and "negative" in rows[3].error
        assert rows[0].token_ids.dtype == np.int32


def test_ids_without_a_mask_are_all_tokens(tmp_path):
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["input_ids"] = np.arange(6).reshape(2, 3)
    assert [row.token_ids.tolist() for row in read(tmp_path / "p.h5")] == [[0, 1, 2], [3, 4, 5]]


def test_one_dataset_a_row(tmp_path):
    with h5py.File(tmp_path / "p.h5", "w") as file:
        for number in range(12):
            file[f"samples/s{number}"] = np.arange(number + 1, dtype=np.int64)
    with pytest.raises(DataError, match="nothing that looks like prompts"):
        open_prompts(tmp_path / "p.h5")
    with open_prompts(tmp_path / "p.h5", "samples") as reader:
        assert [len(row.token_ids) for row in reader.rows()] == list(range(1, 13))
        assert list(reader.ids(1, 3)) == ["s1", "s2"]


def _shards(tmp_path):
    sizes = (3, 0, 5, 1)
    for number, size in zip((0, 2, 10, 9), sizes, strict=True):
        with h5py.File(tmp_path / f"data-{number}.h5", "w") as file:
            file.create_dataset("text", data=[f"{number}.{n}" for n in range(size)], dtype=h5py.string_dtype())
    # Natural order: 0, 2, 9, 10.
    return ["0.0", "0.1", "0.2", "9.0", "10.0", "10.1", "10.2", "10.3", "10.4"]


def test_shards_as_folder_and_glob(tmp_path):
    texts = _shards(tmp_path)
    for path in (tmp_path, str(tmp_path), f"{tmp_path}/data-*.h5"):
        with open_prompts(path) as reader:
            rows = list(reader.rows())
            assert [row.text for row in rows] == texts
            assert [row.row for row in rows] == list(range(9))
            for start in range(9):
                assert [row.text for row in reader.rows(start, 9)] == texts[start:]
                assert [row.text for row in reader.rows(0, start)] == texts[:start]


def test_a_list_keeps_its_order_and_layouts_may_differ(tmp_path):
    write_packed(tmp_path / "b.h5", ["b0", "b1"])
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("text", data=["a0"], dtype=h5py.string_dtype())
    assert [row.text for row in read([tmp_path / "b.h5", tmp_path / "a.h5"])] == ["b0", "b1", "a0"]


def test_more_shards_than_open_files(tmp_path):
    for number in range(30):
        write_packed(tmp_path / f"{number:02}.h5", [f"{number}"])
    with open_prompts(tmp_path) as reader:
        assert [row.text for row in reader.rows()] == [str(n) for n in range(30)]
        assert len(reader._open) <= 8


def test_shards_of_two_kinds(tmp_path):
    write_packed(tmp_path / "a.h5", ["text"])
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["input_ids"] = np.ones((1, 2), int)
    with pytest.raises(DataError, match="two kinds"):
        open_prompts(tmp_path)


def test_names_with_quotes_spaces_and_newlines(tmp_path):
    path = write_packed(tmp_path / "a 'b\" \n[c]*.h5", TEXTS)
    assert [row.text for row in read(path)] == TEXTS


# What is wrong with a file as a whole.


def test_a_wrong_name_lists_what_there_is(tmp_path):
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["one/two"] = np.zeros((3, 4), np.float32)
        file.create_dataset("text", data=["a"], dtype=h5py.string_dtype())
    with pytest.raises(DataError) as caught:
        open_prompts(tmp_path / "p.h5", "prompt")
    assert "/one/two  [3, 4] float32" in str(caught.value)
    assert "/text  [1] string (variable length)" in str(caught.value)


def test_two_candidates_are_named(tmp_path):
    with h5py.File(tmp_path / "p.h5", "w") as file:
        for name in ("text", "label"):
            file.create_dataset(name, data=["a"], dtype=h5py.string_dtype())
    with pytest.raises(DataError, match="2 datasets") as caught:
        open_prompts(tmp_path / "p.h5")
    assert "text" in str(caught.value) and "label" in str(caught.value)
    assert read(tmp_path / "p.h5", "label")[0].text == "a"


def _truncated(path):
    write_packed(path, TEXTS)
    path.write_bytes(path.read_bytes()[:-200])


def _wrong_dtype(path):
    with h5py.File(path, "w") as file:
        file["prompts/data"], file["prompts/offsets"] = np.zeros(4), np.array([0, 4])


def _float_offsets(path):
    with h5py.File(path, "w") as file:
        file["prompts/data"], file["prompts/offsets"] = np.zeros(4, np.uint8), np.array([0.0, 4.0])


def _no_offsets(path):
    with h5py.File(path, "w") as file:
        file["prompts/data"] = np.zeros(4, np.uint8)


def _newer(path):
    write_packed(path, TEXTS)
    with h5py.File(path, "a") as file:
        file.attrs.update({"format": "hpcinfer-prompts", "version": 9})


def _other_count(path):
    write_packed(path, TEXTS)
    with h5py.File(path, "a") as file:
        file.attrs.update({"format": "hpcinfer-prompts", "version": 1, "n_rows": 77})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_text("prompt,id\n"), "cannot open"),
        (lambda path: path.mkdir(), "no prompts in the folder"),
        (_truncated, "cannot open|damaged|cannot read"),
        (_wrong_dtype, "holds no prompts"),
        (_float_offsets, "packed column"),
        (_no_offsets, "nothing that looks like prompts"),
        (_newer, "version 9"),
        (_other_count, "does not hold what it says"),
        (lambda path: write_packed(path, TEXTS, max_tokens=np.ones(3, int)), "does not fit"),
        (lambda path: write_packed(path, TEXTS, max_tokens=np.array([b"x"] * 4)), "not numbers"),
        (lambda path: write_packed(path, TEXTS, stop_token_ids=np.ones(4, int)), "not a group"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(tmp_path, make, words):
    path = tmp_path / "p.h5"
    make(path)
    with pytest.raises(DataError, match=words):
        read(path)


def test_a_range_outside(tmp_path):
    with open_prompts(write_packed(tmp_path / "p.h5", TEXTS)) as reader:
        for start, stop in ((-1, 2), (0, 5), (3, 2)):
            with pytest.raises(DataError):
                reader.rows(start, stop)


# Bad rows among good ones.


def test_bad_rows_do_not_touch_the_good_ones(tmp_path):
    path = write_packed(tmp_path / "p.h5", ["good", b"\xff\xfe", b"", "also good", "ü"])
    rows = read(path)
    assert [row.text for row in rows] == ["good", None, None, "also good", "ü"]
    assert "UTF-8" in rows[1].error and "empty" in rows[2].error
    with pytest.raises(RowError, match="UTF-8"):
        sampling_for(rows[1], SamplingParams())


def test_bad_token_ids(tmp_path):
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["prompts/data"] = np.array([1, 2, -3, 4, 2**40, 5], np.int64)
        file["prompts/offsets"] = np.array([0, 2, 4, 5, 6])
    rows = read(tmp_path / "p.h5")
    assert rows[0].token_ids.tolist() == [1, 2] and rows[3].token_ids.tolist() == [5]
    assert "negative" in rows[1].error and "above" in rows[2].error


def test_bad_sampling_values(tmp_path):
    path = write_packed(
        tmp_path / "p.h5", TEXTS,
        temperature=np.array([0.5, np.nan, 1.0, -1.0]), max_tokens=np.array([5, 5, 0, 5], np.int16),
    )  # fmt: skip
    rows = read(path)
    assert sampling_for(rows[0], SamplingParams()) == SamplingParams(temperature=0.5, max_tokens=5)
    assert "NaN" in rows[1].error
    for row in rows[2:]:
        with pytest.raises(RowError, match="max_tokens|temperature"):
            sampling_for(row, SamplingParams())


@pytest.mark.parametrize("place", range(1, 9))
@pytest.mark.parametrize("value", [-5, 0, 10**9, 3, 33])
def test_one_corrupt_offset_costs_its_neighbours_at_most(tmp_path, place, value):
    texts = [f"text{n}" for n in range(10)]
    path = write_packed(tmp_path / "p.h5", texts)
    with h5py.File(path, "a") as file:
        file["prompts/offsets"][place] = value
    rows = read(path)
    for number, row in enumerate(rows):
        if abs(number - place + 0.5) > 2:
            assert row.text == texts[number]
    assert rows[place - 1].text != texts[place - 1] or rows[place].text != texts[place]
    # The same rows are bad wherever a range begins.
    with open_prompts(path) as reader:
        for start in range(10):
            assert [row.error for row in reader.rows(start, 10)] == [row.error for row in rows[start:]]


def test_a_flipped_bit_costs_its_chunk(tmp_path):
    path = tmp_path / "p.h5"
    texts = [f"{n:06}" + "x" * 94 for n in range(5000)]
    with PromptsWriter(path) as writer:
        for text in texts:
            writer.append(text)
    with h5py.File(path) as file:
        info = file["prompts/data"].id.get_chunk_info(3)
        offsets_info = file["prompts/offsets"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[info.byte_offset + 50] ^= 1
    path.write_bytes(content)
    rows = read(path)
    low, high = 3 * 65536 // 100, -(-4 * 65536 // 100)
    for number, row in enumerate(rows):
        if low <= number < high:
            assert "checksum" in row.error
        else:
            assert row.text == texts[number]
    content[offsets_info.byte_offset + 50] ^= 1
    path.write_bytes(content)
    assert all(row.error for row in read(path))


@pytest.mark.parametrize("name", ["max_tokens", "temperature"])
def test_a_flipped_bit_in_a_sampling_column(tmp_path, name):
    path = tmp_path / "p.h5"
    with PromptsWriter(path) as writer:
        for number in range(10_000):
            writer.append(f"{number}", overrides={name: number + 1})
    with h5py.File(path) as file:
        info = file[name].id.get_chunk_info(1)
    content = bytearray(path.read_bytes())
    content[info.byte_offset + 7] ^= 64
    path.write_bytes(content)
    rows = read(path)
    assert all(row.text == str(row.row) and row.overrides == {name: row.row + 1} for row in rows[:8192])
    assert all("checksum" in row.error for row in rows[8192:])


def test_a_row_too_long_for_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "MAX_ROW_BYTES", 1000)
    rows = read(write_packed(tmp_path / "p.h5", ["short", "x" * 1001, "y" * 1000]))
    assert [row.error is None for row in rows] == [True, False, True]
    assert "1001 bytes" in rows[1].error


def test_blocks_are_split_by_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "BLOCK_BYTES", 500)
    texts = [chr(97 + n % 26) * (n * 7 % 400 + 1) for n in range(200)]
    assert [row.text for row in read(write_packed(tmp_path / "p.h5", texts))] == texts


# Identity.


def _write(path, texts, **overrides):
    with PromptsWriter(path) as writer:
        for text in texts:
            writer.append(text, overrides=overrides)
    return path


def test_the_same_input_elsewhere(tmp_path):
    stored = input_identity(_write(tmp_path / "a.h5", TEXTS * 500))
    with open_prompts(_write(tmp_path / "b.h5", TEXTS * 500)) as reader:
        assert check_identity(stored, reader) == 0


def test_appended_rows_are_counted(tmp_path):
    stored = input_identity(_write(tmp_path / "a.h5", TEXTS * 500))
    with open_prompts(_write(tmp_path / "b.h5", TEXTS * 500 + ["new"] * 3)) as reader:
        assert check_identity(stored, reader) == 3
        with open_prompts(tmp_path / "a.h5") as before:
            assert prefix_fingerprint(reader, 2000) == prefix_fingerprint(before)
            assert prefix_fingerprint(reader) != prefix_fingerprint(before)


@pytest.mark.parametrize("native", [True, False])
def test_other_inputs_are_refused(tmp_path, native):
    write = _write if native else write_packed
    texts = [f"prompt {n:05}" for n in range(2000)]
    stored = input_identity(write(tmp_path / "a.h5", texts))
    changed = texts.copy()
    # Same lengths; a file of ours has its whole content hashed, of another only a sample is compared.
    changed[1001 if native else 0] = "Prompt 00000"
    for number, other in enumerate((changed, texts[:-1], texts[1:], [*texts[:7], texts[7] + "!", *texts[8:]])):
        with open_prompts(write(tmp_path / f"{number}.h5", other)) as reader, pytest.raises(RunDirectoryError):
            check_identity(stored, reader)
    if native:
        with open_prompts(_write(tmp_path / "o.h5", texts, seed=3)) as reader, pytest.raises(RunDirectoryError):
            check_identity(stored, reader)


def test_a_fingerprint_of_another_making_is_not_used(tmp_path):
    for name, texts in (("a.h5", TEXTS * 500), ("b.h5", TEXTS * 500 + ["new"])):
        with h5py.File(write_packed(tmp_path / name, texts), "a") as file:
            file.attrs.update({"format": "hpcinfer-prompts", "version": 1, "fingerprint": f"sha256:{name}"})
    stored = input_identity(tmp_path / "a.h5")
    assert stored["fingerprint"] == ""
    with open_prompts(tmp_path / "b.h5") as reader:
        assert check_identity(stored, reader) == 1


def test_a_stored_identity_that_is_not_one(tmp_path):
    with open_prompts(_write(tmp_path / "a.h5", TEXTS)) as reader, pytest.raises(HpcinferError):
        check_identity({"num_rows": 4}, reader)


def test_identity_of_foreign_layouts_and_shards(tmp_path):
    _shards(tmp_path)
    stored = input_identity(tmp_path)
    with open_prompts(tmp_path) as reader:
        assert check_identity(stored, reader) == 0
    with h5py.File(tmp_path / "data-11.h5", "w") as file:
        file.create_dataset("text", data=["more"], dtype=h5py.string_dtype())
    with open_prompts(tmp_path) as reader:
        assert check_identity(stored, reader) == 1
    (tmp_path / "data-0.h5").unlink()
    with open_prompts(tmp_path) as reader, pytest.raises(RunDirectoryError):
        check_identity(stored, reader)


def test_a_candidate_of_the_wrong_dtype_is_said(tmp_path):
    with h5py.File(tmp_path / "float.h5", "w") as file:
        file["input_ids"] = np.ones((3, 4), np.float32)
    with pytest.raises(DataError, match="not their dtype"):
        open_prompts(tmp_path / "float.h5")
