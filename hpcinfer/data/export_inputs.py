"""Input columns beside generations: ids, prompts and meta columns of rows that come in ascending order, read block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpcinfer.data.prompts.packed import BLOCK_ROWS
from hpcinfer.data.prompts.reader import PromptsReader
from hpcinfer.errors import DataError

ALL = "all"
NONE = "none"
_SMALL_BLOCK_ROWS = 256


class InputColumns:
    """What an exported row gets from its prompt.

    Args:
        reader: the prompts that were run.
        prompts: also the prompt itself, text or token ids; None where it could not be read.
        meta: meta columns by name.
        taken: names that are no longer free: a meta column of such a name becomes "meta.NAME".
    """

    def __init__(
        self, reader: PromptsReader, *, prompts: bool = False, meta: tuple[str, ...] = (), taken: frozenset[str] = frozenset()
    ) -> None:
        self._reader = reader
        self._prompts = prompts
        self._meta = _unlike(taken | {"id", "prompt"}, meta)
        self.names = ["id", *(["prompt"] if prompts else []), *self._meta.values()]
        """The keys of what `of` returns."""
        # Blocks with prompts or meta values are smaller, because a row may be long.
        self._block_rows = _SMALL_BLOCK_ROWS if prompts or meta else BLOCK_ROWS
        self._first = 0
        self._block: list[dict[str, Any]] = []

    def of(self, row: int) -> dict[str, Any]:
        """The input columns of a row. Raises DataError where the prompts have no such row."""
        if not self._first <= row < self._first + len(self._block):
            if row >= self._reader.num_rows:
                raise DataError(
                    f"the generations are not of {self._reader.paths[0]}",
                    found=f"row {row}, but {self._reader.num_rows} prompts",
                    fix="give the prompts that the run read",
                )
            self._first = row - row % self._block_rows
            self._read(min(self._first + self._block_rows, self._reader.num_rows))
        return self._block[row - self._first]

    def _read(self, stop: int) -> None:
        self._block = [{"id": id} for id in self._reader.ids(self._first, stop)]
        if self._prompts:
            for entry, row in zip(self._block, self._reader.rows(self._first, stop), strict=True):
                entry["prompt"] = row.text if row.token_ids is None else row.token_ids.tolist()
        for name, key in self._meta.items():
            for entry, value in zip(self._block, self._reader.meta(name, self._first, stop), strict=True):
                entry[key] = value


def meta_names(setting: str, reader: PromptsReader) -> tuple[str, ...]:
    """The meta columns that a setting stands for: "all", "none", or names with commas.

    Raises:
        DataError: there is no such meta column.
    """
    if setting == NONE:
        return ()
    there = reader.meta_names()
    names = there if setting == ALL else tuple(name.strip() for name in setting.split(",") if name.strip())
    if missing := [name for name in names if name not in there]:
        raise DataError(
            f"{reader.paths[0]} has no meta column {missing[0]!r}",
            found=", ".join(there) or "none at all",
            fix="name the columns to keep at `hpcinfer convert --meta-columns`",
        )
    return tuple(names)


def _unlike(taken: frozenset[str], names: Sequence[str]) -> dict[str, str]:
    """Name -> the name to show it by, which is neither taken nor that of another."""
    shown: dict[str, str] = {}
    used = set(taken) | {name for name in names if name not in taken}
    for name in names:
        shown[name] = name
        if name in taken:
            while shown[name] in used:
                shown[name] = f"meta.{shown[name]}"
            used.add(shown[name])
    return shown
