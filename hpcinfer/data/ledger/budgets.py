"""Memory budgets that lives of a run have found too high: the next lives take less.

A file `budgets/<time>-<random>.json` for each, created whole and never changed. A budget counts for starts in the same layout: the
memory of another is another.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from hpcinfer.data.ledger.commit import commit_bytes
from hpcinfer.data.ledger.run_directory import RunDirectory, storage_errors

FOLDER = "budgets"
LESS = 0.85
"""Of the K/V tokens that were too many."""


def record_budget(run: RunDirectory, *, layout: str, num_tokens: int, place: str) -> int:
    """A life with K/V pages for `num_tokens` tokens on each rank ran out of memory; returns what the next may have.

    Args:
        layout: of the replica.
        place: rank and host, for people.
    """
    less = int(num_tokens * LESS)
    facts = {"layout": layout, "kv_tokens": less, "ran_out_with": num_tokens, "place": place}
    with storage_errors(run.path):
        folder = run.path / FOLDER
        folder.mkdir(exist_ok=True)
        commit_bytes(folder, f"{time.time_ns()}-{os.urandom(4).hex()}.json", (json.dumps(facts) + "\n").encode())
    return less


def read_budget(run: RunDirectory, *, layout: str) -> int | None:
    """The K/V tokens that a start in this layout may have; None where none has run out of memory."""
    with storage_errors(run.path):
        found = [_read(path) for path in sorted((run.path / FOLDER).glob("*.json"))]
    return min((tokens for where, tokens in found if where == layout and tokens > 0), default=None)


def _read(path: Path) -> tuple[str, int]:
    """Layout and tokens; what is damaged says nothing."""
    try:
        facts = json.loads(path.read_bytes())
        return str(facts["layout"]), int(facts["kv_tokens"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return "", 0
