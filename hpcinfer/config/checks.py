"""Checks that several readers of a model's config share."""

from __future__ import annotations

from hpcinfer.errors import CheckpointError


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise CheckpointError, which lists what is supported, unless `value` is one of `allowed`."""
    if value not in allowed:
        raise CheckpointError(f"{name} {value!r} is not supported", fix=f"supported: {', '.join(allowed)}")
