"""Converter of Parquet, batch by batch (pyarrow, the extra `tables`)."""

from __future__ import annotations

import contextlib
import datetime
import decimal
from collections.abc import Iterator
from typing import Any

from hpcinfer.data.convert.base import Converter, ConvertOptions, Record, Reject, register
from hpcinfer.data.convert.columns import ColumnMapper
from hpcinfer.data.prompts import schema
from hpcinfer.errors import ConfigError, DataError

_BATCH_ROWS = 1024
_BATCH_BYTES = 16 << 20
_READ_ERRORS = (OSError, ValueError, TypeError, KeyError, NotImplementedError, RuntimeError, MemoryError, OverflowError)
"""What pyarrow raises for damaged files: ArrowInvalid is a ValueError, ArrowTypeError a TypeError ..."""


def pyarrow_module(name: str) -> Any:
    """`pyarrow` or a part of it. Raises DataError that says how to get it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError("Parquet needs pyarrow", found=str(error), fix="pip install 'hpcinfer[tables]'") from error


@register
class Parquet(Converter):
    """A row a prompt: text, or a list of token ids, or chat messages (a list of structs). Only columns that are used are read."""

    name = "parquet"
    suffixes = (".parquet", ".pq")
    unit = "row"

    def __init__(self, options: ConvertOptions) -> None:
        super().__init__(options)
        self._mapper = ColumnMapper(options)

    def records(self, source: str) -> Iterator[Record | Reject]:
        """Yields a Record or a Reject a row."""
        parquet = pyarrow_module("pyarrow.parquet")
        try:
            # Opened here: pyarrow takes names as UTF-8 URIs, and its errors do not say what is wrong with a file.
            with open(source, "rb") as file:
                if not file.read(1):
                    raise DataError(f"{source} is empty", found="0 bytes", fix="a Parquet file is needed")
                file.seek(0)
                yield from self._rows(source, parquet.ParquetFile(file, pre_buffer=False))
        except IsADirectoryError as error:
            raise DataError(f"{source} is a folder", fix="name a file in it, or a glob such as 'FOLDER/*.parquet'") from error
        except _READ_ERRORS as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise DataError(f"cannot read {source} as Parquet", found=reason, fix="the file may be damaged; get it again") from error

    def _rows(self, source: str, file: Any) -> Iterator[Record | Reject]:
        there = file.schema_arrow.names
        if doubled := {name for name in there if there.count(name) > 1}:
            raise DataError(f"{source} has two columns named {sorted(doubled)[0]!r}", fix="give each column a name of its own")
        wanted = self._mapper.columns()
        names = [name for name in there if wanted is None or name in wanted]
        if not names:
            raise DataError(f"{source} has none of the columns asked for", found=schema.shorten(there), fix="check --prompt-column")
        number = 0
        for batch in file.iter_batches(_batch_rows(file.metadata), columns=names, use_threads=False):
            for values in _dicts(batch):
                if isinstance(values, Exception):
                    yield Reject(number, f"the row cannot be read: {values}")
                else:
                    yield self._item(number, values)
                number += 1

    def _item(self, number: int, values: dict[str, Any]) -> Record | Reject:
        values = {name: plain(value) for name, value in values.items()}
        # Cut before it is made text: a value may have a hundred megabytes.
        shown = {name: value[:500] if isinstance(value, str | bytes | list) else value for name, value in values.items()}
        raw = schema.shorten(shown, 1000)
        try:
            return self._mapper.record(number, values, raw)
        except (DataError, ConfigError) as error:
            return Reject(number, schema.one_line(error), raw)


def _batch_rows(metadata: Any) -> int:
    """Rows read at a time: fewer where they are long, by the sizes that the file states of its row groups."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    longest = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(longest, 1)))


def _dicts(batch: Any) -> Iterator[dict[str, Any] | Exception]:
    try:
        yield from batch.to_pylist()
        return
    except (UnicodeDecodeError, ValueError, OverflowError):
        pass  # one value of one row; to_pylist fails before it gives any row
    for index in range(batch.num_rows):
        try:
            yield batch.slice(index, 1).to_pylist()[0]
        except (UnicodeDecodeError, ValueError, OverflowError) as error:
            yield error


def plain(value: Any) -> Any:
    """A value of a table as JSON has it: dates as ISO 8601, decimals as text, binary values as the UTF-8 text that they hold (many
    writers do not mark their strings as such)."""
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode()
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value] if value and not isinstance(value[0], int) else value
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    return str(value) if isinstance(value, decimal.Decimal | datetime.timedelta) else value
