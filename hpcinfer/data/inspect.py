"""Says what a file or folder of ours (or any HDF5 file) holds: kind, rows, columns, attributes, first rows."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcinfer.data.export import GENERATIONS_FILE, RUN_FILE, as_entry
from hpcinfer.data.generations import GenerationFile
from hpcinfer.data.hdf5 import READ_ERRORS, describe_shape, open_input
from hpcinfer.data.prompts.prompt_row import PromptsReader
from hpcinfer.data.prompts.reader import open_prompts
from hpcinfer.errors import DataError
from hpcinfer.units import counted, format_bytes

MOST_COLUMNS = 100
_SHOWN_CHARACTERS = 160
_SHOWN_IDS = 16


@dataclasses.dataclass(slots=True)
class Description:
    """What is in a path, in values that JSON can hold."""

    path: str
    kind: str
    """"prompts", "generations", "run directory" or "HDF5"."""
    layout: str = ""
    num_rows: int | None = None
    size_bytes: int = 0
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """Dataset -> shape and dtype."""
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    contents: dict[str, Any] = dataclasses.field(default_factory=dict)
    """For a run directory: counts of what lies in it."""
    first_rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    note: str = ""
    """Why something of the above is missing."""


def describe(path: str | os.PathLike, *, num_rows: int = 3, dataset: str | None = None) -> Description:
    """Describes prompts (a file, or a folder or glob of shards), a segment, generations, a run, or any HDF5 file.

    Args:
        num_rows: how many of the first rows to read.
        dataset: for foreign prompts, where they are.
    Raises:
        DataError: nothing there, or not readable as any of these.
    """
    text = os.fspath(path)
    if os.path.isdir(text) and os.path.exists(os.path.join(text, RUN_FILE)):
        return _describe_run(Path(text), num_rows)
    if os.path.isdir(text) or not os.path.exists(text):
        return _describe_prompts(text, num_rows, dataset)
    with open_input(text) as file:
        description = Description(text, "HDF5", size_bytes=os.stat(text).st_size)
        description.attributes = _attributes(file)
        description.columns = _columns(file)
        stated = str(description.attributes.get("format", ""))
    if stated == "hpcinfer-generations":
        _add_generations(description, num_rows)
        return description
    try:
        found = _describe_prompts(text, num_rows, dataset)
    except DataError as error:
        # An HDF5 file of any other kind is still worth a list of what is in it; one that says it is ours is damaged.
        if stated.startswith("hpcinfer-") or dataset:
            raise
        description.note = f"no prompts: {error.problem}"
        return description
    found.attributes, found.columns = description.attributes, description.columns
    return found


def _describe_prompts(path: str, num_rows: int, dataset: str | None) -> Description:
    with open_prompts(path, dataset) as reader:
        sizes = sum(os.stat(file).st_size for file in reader.paths)
        description = Description(path, "prompts", reader.layout, reader.num_rows, sizes)
        description.first_rows = list(_first_prompts(reader, num_rows))
        if len(reader.paths) > 1:
            description.contents = {"files": len(reader.paths), "first": reader.paths[0], "last": reader.paths[-1]}
    return description


def _first_prompts(reader: PromptsReader, num_rows: int) -> Iterator[dict[str, Any]]:
    stop = min(num_rows, reader.num_rows)
    for row, id in zip(reader.rows(0, stop), reader.ids(0, stop), strict=True):
        entry: dict[str, Any] = {"row": row.row}
        if id is not None:
            entry["id"] = id
        if row.error is not None:
            entry["error"] = row.error
        elif row.text is not None:
            entry["prompt"] = row.text
        else:
            entry["token_ids"] = row.token_ids.tolist()
        yield entry | dict(row.overrides)


def _add_generations(description: Description, num_rows: int) -> None:
    description.kind = "generations"
    try:
        with GenerationFile(description.path) as file:
            description.num_rows = file.num_rows
            description.layout = "complete" if file.complete else "segment, or output that is not complete"
            description.first_rows = [
                as_entry(one, token_ids=True, optional=file.optional) for one in itertools.islice(file, num_rows)
            ]
    except OSError as error:
        raise DataError(f"cannot read {description.path}", found=str(error)) from error


def _describe_run(path: Path, num_rows: int) -> Description:
    description = Description(str(path), "run directory")
    try:
        facts = json.loads((path / RUN_FILE).read_bytes())
        description.attributes = facts if isinstance(facts, dict) else {}
        for folder, ending in (("writers", ".json"), ("claims", ""), ("segments", ".h5"), ("logs", "")):
            names = os.listdir(path / folder) if (path / folder).is_dir() else []
            description.contents[folder] = sum(name.endswith(ending) and not name.startswith(".") for name in names)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a run directory", found=str(error)) from error
    output = path / GENERATIONS_FILE
    if output.is_file():
        inner = describe(output, num_rows=num_rows)
        description.num_rows, description.size_bytes = inner.num_rows, inner.size_bytes
        description.layout, description.columns = inner.layout, inner.columns
        description.first_rows = inner.first_rows
    else:
        description.note = f"no {GENERATIONS_FILE} yet: the run is not complete"
    return description


def _attributes(file: h5py.File) -> dict[str, Any]:
    try:
        return {name: _plain(value) for name, value in itertools.islice(file.attrs.items(), MOST_COLUMNS)}
    except READ_ERRORS as error:
        raise DataError(f"the attributes of {file.filename} cannot be read", found=str(error)) from error


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.ndarray):
        return [_plain(one) for one in value.ravel()[:_SHOWN_IDS].tolist()]
    value = value.item() if isinstance(value, np.generic) else value
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _columns(file: h5py.File) -> dict[str, str]:
    columns: dict[str, str] = {}

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> bool | None:
        if isinstance(item, h5py.Dataset):
            columns[f"/{name}"] = describe_shape(item)
        return True if len(columns) >= MOST_COLUMNS else None  # anything but None ends the visit

    try:
        file.visititems(visit)
    except READ_ERRORS as error:
        raise DataError(f"the contents of {file.filename} cannot be listed", found=str(error)) from error
    return columns


def render(description: Description) -> str:
    """The description as text for people."""
    d = description
    head = [f"{d.path}: {d.kind}" + (f" ({d.layout})" if d.layout else "")]
    if d.num_rows is not None:
        head.append(counted(d.num_rows, "row"))
    if d.size_bytes:
        head.append(format_bytes(d.size_bytes))
    lines = [", ".join(head)]
    for title, values in (("attributes", d.attributes), ("contents", d.contents), ("columns", d.columns)):
        if values:
            width = max(len(name) for name in values)
            lines.append(f"{title}:")
            lines += [f"  {name:<{width}}  {_short(value)}" for name, value in values.items()]
    if d.first_rows:
        lines.append("first rows:")
        for entry in d.first_rows:
            shown = [f"{key}={_short(value)}" for key, value in entry.items() if key != "row" and value is not None]
            lines.append(f"  {entry['row']}: {', '.join(shown)}")
    if d.note:
        lines.append(f"note: {d.note}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > _SHOWN_IDS:
        return f"[{', '.join(map(str, value[:_SHOWN_IDS]))}, ... {len(value)} in all]"
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)
    shown = text[:_SHOWN_CHARACTERS]
    shown = shown if shown.isprintable() else repr(shown)
    return shown if len(text) <= _SHOWN_CHARACTERS else f"{shown}... ({len(text)} characters)"
