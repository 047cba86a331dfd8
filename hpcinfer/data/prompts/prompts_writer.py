"""Writes a prompts file, version 1, row by row in flat memory; the file appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import h5py
import numpy as np

from hpcinfer.data.prompts import schema
from hpcinfer.data.prompts.fingerprint import DIGEST_BYTES, FingerprintChain
from hpcinfer.data.hdf5 import CHUNK_BYTES, LIBVER, whole_file
from hpcinfer.data.hdf5_output import OutputFile
from hpcinfer.data.prompts.packed import MAX_ROW_BYTES, ColumnWriter, PackedWriter
from hpcinfer.errors import ConfigError, DataError

MAX_META_COLUMNS = 256
"""Each column costs a buffer and 8 bytes a row; more keys than this are data that got into the keys."""


class _PackedColumn:
    """A packed column of JSON values (or plain text) that rows may lack."""

    def __init__(self, group: h5py.Group, encoding: str, first_row: int) -> None:
        group.attrs[schema.ENCODING] = encoding
        self._column = PackedWriter(group, "u1", first_row=first_row)

    def put(self, row: int, value: bytes) -> None:
        self._column.skip_to(row)
        self._column.append(value)

    def finish(self, num_rows: int) -> None:
        self._column.finish(num_rows)


class _NumberColumn:
    """A column of numbers with a stated value for "not given"."""

    def __init__(self, file: h5py.File, column: schema.SamplingColumn, first_row: int) -> None:
        attributes = {schema.NOT_GIVEN: np.array(column.not_given, column.dtype)}
        self._column = ColumnWriter(
            file, column.name, column.dtype, fill=column.not_given, first_row=first_row, attributes=attributes
        )

    def put(self, row: int, value: int | float) -> None:
        self._column.skip_to(row)
        self._column.append(value)

    def finish(self, num_rows: int) -> None:
        self._column.finish(num_rows)


class PromptsWriter:
    """Streams prompts into a new file. Use as a context manager: leaving it well commits, an exception leaves nothing.

    The fingerprint is computed while writing and stored (see data/prompts/fingerprint.py for what is hashed).

    Args:
        path: the file to appear; an existing one is replaced at the end, in one step.
        kind: "text" (str or UTF-8 bytes) or "token_ids" (int32); one kind a file.
    Raises:
        DataError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike, *, kind: str = schema.TEXT) -> None:
        if kind not in schema.KIND_DTYPES:
            raise DataError(f"kind of prompts {kind!r}", fix=f"use one of {', '.join(schema.KIND_DTYPES)}")
        self.path = path
        self.kind = kind
        self.num_rows = 0
        self.num_rejected: int | None = None
        """Lines of the source that are not in the file, where whoever writes knows; kept as an attribute."""
        self._is_finished = False
        self.is_broken = False
        """The file could not be written; nothing more can be appended."""
        with _write_errors(path), contextlib.ExitStack() as stack:
            self._output = stack.enter_context(contextlib.closing(OutputFile(stack.enter_context(whole_file(path)))))
            # The last callback to run before the file gets its name: what was written while closing counts too.
            stack.callback(self._check_when_committing)
            self._file = stack.enter_context(h5py.File(self._output, "w", libver=LIBVER))
            self._prompts = PackedWriter(self._file.create_group(schema.PROMPTS_GROUP), schema.KIND_DTYPES[kind])
            self._stack = stack.pop_all()
        self._ids: _PackedColumn | None = None
        self._overrides: dict[str, _PackedColumn | _NumberColumn] = {}
        self._chain = FingerprintChain(kind)
        self._meta: dict[str, _PackedColumn] = {}

    def __enter__(self) -> PromptsWriter:
        return self

    def __exit__(self, kind, error, trace) -> bool | None:
        with _write_errors(self.path):
            if kind is None:
                with self._stack:
                    self._finish()
                return None
            return self._stack.__exit__(kind, error, trace)

    def append(
        self,
        prompt: str | bytes | Sequence[int] | np.ndarray,
        *,
        id: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> int:
        """Adds one row and returns its number.

        Args:
            prompt: str or UTF-8 bytes for text, integers for token ids.
            id: the user's own name for the row.
            overrides: SamplingParams fields of this row alone. Types are checked here, ranges by
                `schema.checked_overrides`.
            meta: any other values, kept as JSON for joins later.
        Raises:
            DataError: the row cannot be stored (lone surrogates, a token id outside int32, too many meta columns);
                nothing of it is written and the next row may follow. Or the disk is full.
        """
        row = self.num_rows
        try:
            # Everything that can fail comes before the first write, so that a refused row leaves no trace.
            stored = _as_text(prompt) if self.kind == schema.TEXT else _as_token_ids(prompt)
            if len(stored) * (1 if self.kind == schema.TEXT else 4) > MAX_ROW_BYTES:
                raise ValueError(f"it is longer than {MAX_ROW_BYTES} bytes")
            stored_id = None if id is None else id.encode()
            given = {key: schema.sampling_value(key, value) for key, value in overrides.items()} if overrides else {}
            columns = {key: _as_column(key, value) for key, value in given.items()}
            encoded = {key: schema.encode_json(value) for key, value in meta.items()} if meta else {}
        except (TypeError, ValueError, OverflowError, RecursionError, ConfigError) as error:
            raise DataError(f"row {row} cannot be stored", found=schema.one_line(error)) from error
        if encoded and len(self._meta.keys() | encoded.keys()) > MAX_META_COLUMNS:
            raise DataError(f"more than {MAX_META_COLUMNS} meta columns", fix="name the columns to keep")
        try:
            self._prompts.append(stored)
            if stored_id is not None:
                self._id_column(row).put(row, stored_id)
            for key, value in columns.items():
                self._put_override(key, row, value)
            for key, value in encoded.items():
                self._meta_column(key, row).put(row, value)
            self._output.check()
        except (OSError, RuntimeError) as error:
            self.is_broken = True
            raise _write_error(self.path, error) from error
        self._chain.add(stored if self.kind == schema.TEXT else stored.tobytes(), given)
        self.num_rows += 1
        return row

    def _id_column(self, row: int) -> _PackedColumn:
        if self._ids is None:
            self._ids = _PackedColumn(self._file.create_group(schema.ID), "utf-8", row)
        return self._ids

    def _meta_column(self, key: str, row: int) -> _PackedColumn:
        if key not in self._meta:
            group = self._file.create_group(f"{schema.META}/{schema.column_name(key)}")
            self._meta[key] = _PackedColumn(group, "json", row)
        return self._meta[key]

    def _put_override(self, name: str, row: int, value: Any) -> None:
        column = schema.SAMPLING_COLUMNS[name]
        if name not in self._overrides:
            if column.dtype == "json":
                self._overrides[name] = _PackedColumn(self._file.create_group(name), "json", row)
            else:
                self._overrides[name] = _NumberColumn(self._file, column, row)
        self._overrides[name].put(row, value)

    def _check_when_committing(self) -> None:
        if self._is_finished:
            self._output.check()

    def _finish(self) -> None:
        self._prompts.finish(self.num_rows)
        for column in (self._ids, *self._overrides.values(), *self._meta.values()):
            if column is not None:
                column.finish(self.num_rows)
        digests = np.frombuffer(self._chain.digests, np.uint8).reshape(-1, DIGEST_BYTES)
        if len(digests):
            rows_a_chunk = min(len(digests), CHUNK_BYTES // DIGEST_BYTES)
            self._file.create_dataset(
                schema.DIGESTS, data=digests, chunks=(rows_a_chunk, DIGEST_BYTES), fletcher32=True
            )
        self._file.attrs.update(
            {
                "format": schema.PROMPTS_FORMAT,
                "version": schema.PROMPTS_VERSION,
                "n_rows": self.num_rows,
                "fingerprint": self._chain.value(),
            }
        )
        if self.num_rejected is not None:
            self._file.attrs[schema.REJECTED] = self.num_rejected
        self._is_finished = True


def _as_column(name: str, value: Any) -> Any:
    """A sampling value as its column stores it. Raises ValueError for NaN and infinities, which the fingerprint cannot hold either."""
    encoded = schema.encode_json(value)
    return encoded if schema.SAMPLING_COLUMNS[name].dtype == "json" else value


def _as_text(prompt: str | bytes) -> bytes:
    if isinstance(prompt, str):
        return prompt.encode()
    if not isinstance(prompt, bytes):
        raise TypeError(f"the prompt is neither text nor bytes: {schema.shorten(prompt)}")
    prompt.decode()  # raises ValueError where the bytes are not UTF-8
    return prompt


def _as_token_ids(prompt: Sequence[int] | np.ndarray) -> np.ndarray:
    values = np.asarray(prompt)
    if values.ndim != 1 or (values.dtype.kind not in "iu" and len(values)):
        raise ValueError(f"token ids must be a list of integers, not {schema.shorten(prompt)}")
    if len(values) and not 0 <= int(values.min()) <= int(values.max()) <= schema.MAX_TOKEN_ID:
        raise ValueError(f"token ids must be from 0 to {schema.MAX_TOKEN_ID}")
    return values.astype(np.int32)


@contextlib.contextmanager
def _write_errors(path: str | os.PathLike) -> Iterator[None]:
    # h5py reports a full disk as OSError from a write and as RuntimeError from a close.
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise _write_error(path, error) from error


def _write_error(path: str | os.PathLike, error: Exception) -> DataError:
    return DataError(f"cannot write {path}", found=str(error), fix="check the folder, the free space and the quota")
