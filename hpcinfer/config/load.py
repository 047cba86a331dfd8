"""TOML files checked as a whole against dataclasses: job files with `--set section.key=value`, and what else is read so."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpcinfer.config.job import JobConfig
from hpcinfer.errors import ConfigError, UsageError

TRIAL_SUFFIX = "-trial"


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read a job file and apply `overrides` ("section.key=value").

    A trial's output is data.output with TRIAL_SUFFIX, unless an override names it.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or a key or value is not valid.
        UsageError: an override is not of the form section.key=value.
    """
    tables = read_toml(path, "the job file")
    for override in overrides:
        apply_override(tables, override)
    job = job_from_tables(tables)
    if job.data.is_trial and not any(override.partition("=")[0].strip() == "data.output" for override in overrides):
        # Beside the run's own directory: a trial is often made to find the settings that the run shall have.
        job = dataclasses.replace(job, data=dataclasses.replace(job.data, output=job.data.output.rstrip("/") + TRIAL_SUFFIX))
    return job


def apply_override(tables: dict[str, Any], override: str) -> None:
    """Put one "section.key=value" into `tables`. The value is read as TOML; what is not TOML is taken as a string.

    A section that may be one text in a job file may be so here too ("task=score").
    """
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if equals and not dot and hasattr(typing.get_type_hints(JobConfig).get(section), "from_text"):
        tables[section] = _toml_value(text)
        return
    if not equals or not dot or not section or not key:
        raise UsageError(f"--set {override!r}", fix="write --set section.key=value, for example --set parallel.tp=2")
    table = tables.setdefault(section, {})
    if not isinstance(table, dict):
        raise ConfigError(f"[{section}] is not a section in the job file", found=f"{section} = {table!r}")
    table[key] = _toml_value(text)


def job_from_tables(tables: Mapping[str, Any]) -> JobConfig:
    """Build a JobConfig from parsed TOML. Raises ConfigError on any unknown, missing or mistyped key."""
    return from_tables(JobConfig, tables, "the job file")


def job_to_tables(job: JobConfig) -> dict[str, Any]:
    """The job as plain nested dicts, every key included: what is recorded with a run."""
    return dataclasses.asdict(job)


def read_toml(path: str | Path, what: str) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError, in which `what` ("the job file") names its kind."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return tomllib.loads(file.read())
    except OSError as error:
        raise ConfigError(f"cannot read {what} {path}", found=str(error), fix="give the path of a TOML file") from error
    except ValueError as error:  # of TOML, of UTF-8, or a number of thousands of digits
        raise ConfigError(f"{what} {path} is not valid TOML", found=str(error)) from error
    except RecursionError as error:
        raise ConfigError(f"{what} {path} nests too deeply") from error


def from_tables(kind: type, tables: Mapping[str, Any], what: str) -> Any:
    """A dataclass from parsed TOML, its fields that are dataclasses from sections.

    Fields may be int, float, str, bool, each or None, tuple[int, ...], tuple[str, ...], dict[str, str], dict[int, float] and dataclasses; a
    dataclass with a classmethod `from_text` may also be given as one text.

    Raises:
        ConfigError: an unknown, missing or mistyped key; `what` ("the job file") names the whole.
    """
    return _build(kind, tables, "", what)


def _toml_value(text: str) -> Any:
    try:
        tables = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    # A text of several lines may be TOML by chance, as the name of a file.
    return tables["value"] if len(tables) == 1 else text


def _build(kind: type, values: Any, where: str, what: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or what} is not a section", found=repr(values), fix=f"write [{where}] above its keys")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise _unknown_key(where, key, list(fields))
    missing = [name for name, field in fields.items() if name not in values and _has_no_default(field)]
    if missing:
        raise ConfigError(f"{what} does not say {', '.join(_dotted(where, name) for name in missing)}")
    hints = typing.get_type_hints(kind)
    arguments = {key: _convert(hints[key], value, _dotted(where, key), what) for key, value in values.items()}
    return kind(**arguments)


def _has_no_default(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(hint: Any, value: Any, name: str, what: str) -> Any:
    if isinstance(hint, types.UnionType):  # X | None
        if value is None:
            return None
        (hint,) = (kind for kind in typing.get_args(hint) if kind is not type(None))
    if dataclasses.is_dataclass(hint):
        if isinstance(value, str) and hasattr(hint, "from_text"):
            return hint.from_text(value)
        return _build(hint, value, name, what)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if not isinstance(value, (list, tuple)) or not all(_is(item, each) for each in value):
            raise ConfigError(f"{name} = {value!r}", fix=f"give a list of {'whole numbers' if item is int else 'texts in quotes'}")
        return tuple(value)
    if typing.get_origin(hint) is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} = {value!r}", fix=f"write [{name}] and below it a line NAME = \"value\" for each")
        item = typing.get_args(hint)[1]
        return {key: _convert(item, each, _dotted(name, key), what) for key, each in value.items()}
    if hint is float and _is(int, value):
        return float(value)
    if hint is str and (_is(int, value) or _is(float, value)):
        return str(value)  # sizes and counts that may carry a unit: 4096 as well as "4 KiB"
    if not _is(hint, value):
        kinds = {int: "a whole number", float: "a number", str: "a text in quotes", bool: "true or false"}
        raise ConfigError(f"{name} = {value!r}", found=type(value).__name__, fix=f"give {kinds[hint]}")
    return value


def _is(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not (kind is not bool and isinstance(value, bool))


def _unknown_key(where: str, key: str, valid: list[str]) -> ConfigError:
    close = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    noun = "key" if where else "section"
    return ConfigError(f"unknown {noun} {_dotted(where, key)}", fix=f"{hint}valid: {', '.join(valid)}")


def _dotted(where: str, key: str) -> str:
    return f"{where}.{key}" if where else str(key)
