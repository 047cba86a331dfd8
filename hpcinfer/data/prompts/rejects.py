"""What was left out when a prompts file was made: a count in the file, and beside it JSON Lines that tell each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from hpcinfer.data.hdf5 import open_input
from hpcinfer.data.prompts import schema
from hpcinfer.errors import DataError


def reject_path(prompts: str | os.PathLike) -> str:
    """Where the lines go that a conversion to `prompts` rejects."""
    return f"{os.fspath(prompts)}.rejected.jsonl"


def num_rejected(prompts: str) -> int:
    """How many rows a prompts file says were rejected when it was made. Raises DataError."""
    with open_input(prompts) as file:
        return int(file.attrs.get(schema.REJECTED, 0))


def stated_rejects(paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What was rejected when the prompts were made: {source, reason, ...}.

    Raises:
        DataError: they are not as many as the prompts say.
    """
    for path in paths:
        stated, name, found = num_rejected(path), reject_path(path), 0
        try:
            if stated:
                with open(name, encoding="utf-8") as lines:
                    for line in lines:
                        reject = json.loads(line)
                        found += 1
                        yield {"source": str(reject["source"]), "reason": str(reject["reason"]), **reject}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _lost(path, name, stated, str(error)) from error
        if found != stated:
            raise _lost(path, name, stated, f"it has {found}")


def _lost(path: str, name: str, stated: int, found: str) -> DataError:
    return DataError(
        f"{stated} lines were rejected when {path} was made, and {name} does not tell them all",
        found=found,
        fix="put the file beside the prompts, or convert the batch again",
    )
