"""The names, versions and columns of prompts files, version 1 (`datasets/PROMPTS.md` is the page for users).

Sampling columns are derived from the fields of `SamplingParams`: a new field is a new column without a line here.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from hpcinfer.errors import ConfigError, HpcinferError
from hpcinfer.request import STRUCTURED_FIELDS, SamplingParams

PROMPTS_FORMAT = "hpcinfer-prompts"
PROMPTS_VERSION = 1

PROMPTS_GROUP = "prompts"
DATA = "data"
OFFSETS = "offsets"
DIGESTS = "prompts/digests"
"""u1 [n_rows // 1024, 32]: the chain of data/prompts/fingerprint.py."""
ID = "id"
META = "meta"

TEXT = "text"
TOKEN_IDS = "token_ids"
KIND_DTYPES = {TEXT: "u1", TOKEN_IDS: "i4"}
"""Kind of prompts -> dtype of /prompts/data."""

MAX_TOKEN_ID = 2**31 - 1

NOT_GIVEN = "not_given"
"""Attribute of a sampling column: the value that means "this row does not override it"."""

REJECTED = "n_rejected"
"""Attribute of the file: how many lines of the source were rejected when it was converted."""

ENCODING = "encoding"
"""Attribute of a packed group: "utf-8" (plain text) or "json" (each row a JSON value, empty where there is none)."""


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingColumn:
    """How one field of SamplingParams is stored per row."""

    name: str
    dtype: str
    """"i8", "f8", "i1" (true and false as 1 and 0), or "json" for fields that are not one number."""
    not_given: int | float | None
    """A value that no row can mean: the least integer, or minus infinity. NaN stays what it is, an error of its row."""
    items: type | None = None
    """For "json": the type of the items where the field is a tuple of one type."""


def _column_of(field: dataclasses.Field) -> SamplingColumn:
    kind = str(field.type).removesuffix(" | None")
    if kind == "int":
        return SamplingColumn(field.name, "i8", -(2**63))
    if kind == "float":
        return SamplingColumn(field.name, "f8", -math.inf)
    if kind == "bool":
        return SamplingColumn(field.name, "i1", -1)
    items = next((t for t in (int, str, float) if kind == f"tuple[{t.__name__}, ...]"), None)
    return SamplingColumn(field.name, "json", None, items)


SAMPLING_COLUMNS: dict[str, SamplingColumn] = {
    f.name: _column_of(f) for f in dataclasses.fields(SamplingParams) if f.name != "n"
}
"""Field name -> column, for every field of SamplingParams that a row may override. `n` is the run's own: it fixes which
(row, sample) pairs there are."""


def sampling_value(name: str, value: Any) -> Any:
    """Checks the type of a per-row value from a file and returns it as SamplingParams takes it.

    Whole floats pass as integers (32.0), because JSON writers make them. Ranges are SamplingParams' own matter.

    Raises:
        ConfigError: the wrong type.
    """
    column = SAMPLING_COLUMNS.get(name)
    if column is None:
        raise ConfigError(f"no sampling field {name!r}", fix=f"known: {', '.join(SAMPLING_COLUMNS)}")
    dtype = column.dtype
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if dtype == "i8" and number and value == value and abs(value) < 2**63 and int(value) == value:
        return int(value)
    if dtype == "f8" and number:
        return float(value)
    if dtype == "i1" and isinstance(value, bool):
        return value
    if dtype == "json" and column.items is None:
        return value
    if column.items is str and isinstance(value, str):
        return (value,)
    if dtype == "json" and isinstance(value, list | tuple) and all(type(item) is column.items for item in value):
        return tuple(value)
    wanted = {
        "i8": "a whole number below 2**63",
        "f8": "a number",
        "i1": "true or false",
        "json": f"a list of {getattr(column.items, '__name__', '')}",
    }[dtype]
    raise ConfigError(f"sampling.{name} = {shorten(value)}", fix=f"{name} must be {wanted}")


def checked_overrides(values: dict[str, Any]) -> dict[str, Any]:
    """Checks types and ranges of one row's sampling values as the run will, and returns them normalised.

    Raises:
        ConfigError: what SamplingParams would refuse.
    """
    overrides = {name: sampling_value(name, value) for name, value in values.items()}
    if overrides:
        _construct(lambda: SamplingParams(**overrides), overrides)
    return overrides


def apply_overrides(defaults: SamplingParams, overrides: dict[str, Any]) -> SamplingParams:
    """`defaults` with one row's values in place. What the row says of the structure of its text replaces all that they say.

    Raises:
        ConfigError: SamplingParams refuses a value, by range or by type.
    """
    if defaults.is_structured and not overrides.keys().isdisjoint(STRUCTURED_FIELDS):
        overrides = dict.fromkeys(STRUCTURED_FIELDS) | overrides
    return _construct(lambda: dataclasses.replace(defaults, **overrides), overrides)


def _construct(make: Callable[[], SamplingParams], overrides: Mapping[str, Any]) -> SamplingParams:
    try:
        return make()
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        # Fields that are lists are converted by SamplingParams itself, in whatever way it checks them.
        raise ConfigError(f"sampling values {shorten(overrides)} are not usable", found=str(error)) from error


def one_line(error: Exception) -> str:
    """An error as one line, for reject files and error columns."""
    parts = (error.problem, error.found, error.fix) if isinstance(error, HpcinferError) else (str(error),)
    return "; ".join(part.replace("\n", " ") for part in parts if part)


def shorten(value: Any, most: int = 80) -> str:
    """`repr`, cut to `most` characters, for messages."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} of many levels"
    return text if len(text) <= most else text[: most - 3] + "..."


# json.dumps with options would build a new encoder for each value.
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def encode_json(value: Any) -> bytes:
    """The compact JSON of a value as UTF-8. Raises ValueError for NaN, infinities and lone surrogates."""
    return _ENCODER.encode(value).encode()


def column_name(key: str) -> str:
    """A key of the input as one HDF5 link name: "/", NUL and the names "." and ".." cannot be links."""
    if not key:
        return "%"  # every other "%" is followed by two digits
    name = key.replace("%", "%25").replace("/", "%2F").replace("\0", "%00")
    return name.replace(".", "%2E") if name in (".", "..") else name


def key_of_column(name: str) -> str:
    """The inverse of `column_name`."""
    return "" if name == "%" else name.replace("%2E", ".").replace("%00", "\0").replace("%2F", "/").replace("%25", "%")
