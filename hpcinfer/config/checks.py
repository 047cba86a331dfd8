"""Checks that several readers of configurations share."""

from __future__ import annotations

from hpcinfer.errors import CheckpointError


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise CheckpointError, which lists what is supported, unless `value` is one of `allowed`."""
    if value not in allowed:
        raise CheckpointError(f"{name} {value!r} is not supported", fix=f"supported: {', '.join(allowed)}")


def has_control_characters(text: str) -> bool:
    """Whether a text holds line breaks, tabs or other control characters of ASCII."""
    return any(ord(letter) < 32 or ord(letter) == 127 for letter in text)
