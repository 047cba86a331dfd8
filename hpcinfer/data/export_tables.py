"""Exported rows as files: JSON Lines, CSV, Parquet. Rows are dicts that all have the same keys."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any, BinaryIO

from hpcinfer.errors import DataError

Entry = dict[str, Any]

_BATCH_ROWS = 1024
_BATCH_CHARACTERS = 8 << 20

_TYPES = {
    "row": "uint64", "sample": "uint16", "num_prompt_tokens": "int32", "num_output_tokens": "int32", "token_ids": "list<int32>",
    "score": "float64", "n_scored_tokens": "int32", "perplexity": "float64", "embedding": "list<float32>",
    "logprobs": "list<float32>", "top_token_ids": "list<list<int32>>", "top_logprobs": "list<list<float32>>",
    "prompt_logprobs": "list<float32>", "prompt_top_token_ids": "list<list<int32>>", "prompt_top_logprobs": "list<list<float32>>",
}  # fmt: skip
"""Parquet types of our own columns that are not text. Any other column is text: a text as it is, another value as JSON."""


def write_json_lines(out: BinaryIO, entries: Iterator[Entry]) -> int:
    """One JSON object a row. Returns the number of rows."""
    return sum(out.write(json_line(entry)) > 0 for entry in entries)


def json_line(entry: Mapping[str, Any]) -> bytes:
    """A JSON object and the end of its line, in UTF-8."""
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def write_csv(out: BinaryIO, entries: Iterator[Entry], names: list[str]) -> int:
    """A header and a row each (RFC 4180, UTF-8); null is an empty field, lists and the like are JSON. Returns the number of rows."""
    text = io.TextIOWrapper(out, "utf-8", "replace", newline="", write_through=True)
    # As RFC 4180 says; some versions of Python quote a "\r" only where it is in the line end.
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(names)
    num_rows = 0
    for entry in entries:
        writer.writerow([_cell(entry[name]) for name in names])
        num_rows += 1
    text.detach()
    return num_rows


def _cell(value: Any) -> Any:
    return "" if value is None else value if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)


def write_parquet(out: BinaryIO, entries: Iterator[Entry], names: list[str], foreign: Collection[str] = ()) -> int:
    """A row each, in batches. Returns the number of rows. Raises DataError without pyarrow.

    Args:
        foreign: the names of columns that are not ours: text, even where ours of that name is not.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("Parquet needs pyarrow", found=str(error), fix="pip install 'hpcinfer[tables]'") from error

    def type_of(name: str) -> pyarrow.DataType:
        return pyarrow.list_(type_of(name[5:-1])) if name.startswith("list<") else getattr(pyarrow, name)()

    types = {name: kind for name, kind in _TYPES.items() if name not in foreign}
    schema = pyarrow.schema([(name, type_of(types.get(name, "string"))) for name in names])
    num_rows = 0
    with pyarrow.parquet.ParquetWriter(out, schema, compression="zstd") as writer:
        for batch in _batches(entries):
            columns = [
                pyarrow.array([entry[name] if name in types else _text(entry[name]) for entry in batch], schema.field(name).type)
                for name in names
            ]
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))
            num_rows += len(batch)
    return num_rows


def _text(value: Any) -> str | None:
    if isinstance(value, str):
        # Arrow takes no lone surrogates; files of ours have none.
        return value.encode("utf-8", "replace").decode()
    return None if value is None else json.dumps(value, ensure_ascii=False)


def _batches(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    batch: list[Entry] = []
    size = 0
    for entry in entries:
        batch.append(entry)
        size += sum(len(value) for value in entry.values() if isinstance(value, str | list))
        if len(batch) == _BATCH_ROWS or size > _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
