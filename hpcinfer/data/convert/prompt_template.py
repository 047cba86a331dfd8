"""Prompts made of columns: "Translate into {language}: {text}". Nothing but names stands in the braces, and nothing is evaluated."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from hpcinfer.data.prompts import schema
from hpcinfer.errors import DataError, UsageError

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")


class PromptTemplate:
    """Text with column names in braces; "{{" and "}}" stand for braces.

    Raises:
        UsageError: a single brace, or no column at all.
    """

    def __init__(self, text: str) -> None:
        self._pieces: list[tuple[bool, str]] = []
        """(whether it is a column, its name or the text)."""
        end = 0
        for match in _PIECE.finditer(text):
            self._pieces.append((False, text[end : match.start()]))
            end = match.end()
            piece = match.group()
            if piece in ("{", "}"):
                raise UsageError(
                    f"a single {piece!r} at position {match.start()} of the prompt template",
                    fix="write {name} for a column, {{ and }} for braces",
                )
            self._pieces.append((True, match.group(1)) if match.group(1) else (False, piece[0]))
        self._pieces.append((False, text[end:]))
        self.columns = frozenset(piece for is_column, piece in self._pieces if is_column)
        if not self.columns:
            raise UsageError("the prompt template names no column", found=schema.shorten(text), fix="write {name} for a column")

    def render(self, values: Mapping[str, Any]) -> str:
        """The prompt of a row: text as it is, anything else as JSON. Raises DataError where a column is missing or null."""
        parts = []
        for is_column, piece in self._pieces:
            if not is_column:
                parts.append(piece)
                continue
            value = values.get(piece)
            if value is None:
                raise DataError(f"no column {piece!r}; the line has {schema.shorten(sorted(values))}")
            try:
                parts.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
            except (TypeError, ValueError, RecursionError) as error:
                raise DataError(f"column {piece!r} has no text: {error}") from error
        return "".join(parts)
