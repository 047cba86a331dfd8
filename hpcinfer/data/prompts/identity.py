"""Recognising an input quickly: the run directory stores an identity, and whoever joins the run compares.

The whole content is hashed once, when a file of ours is written (data/prompts/fingerprint.py). A joiner cannot read hundreds of
gigabytes again, so it looks at the number of rows, the stored fingerprint, the offsets and a sample of the rows. All of
it is computed for the first n rows alone, which is how an input that grew at its end is told from another input.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import numpy as np

from hpcinfer.data.prompts.prompt_row import PromptsReader
from hpcinfer.errors import DataError, RunDirectoryError

_SAMPLED_PLACES = 64
_ROWS_A_PLACE = 16


def identity_of(reader: PromptsReader, num_rows: int | None = None) -> dict[str, Any]:
    """A dict of small JSON values that is the same for the same input, wherever its files lie.

    Keys: kind, num_rows, size_bytes (of all files together), fingerprint ("" for foreign layouts), offsets_hash (all
    offsets, or 128 blocks of them in large files), sample_hash (64 evenly spaced runs of 16 rows and their overrides).

    Args:
        reader: the input.
        num_rows: describe the first rows alone; only size_bytes still speaks of the whole.
    """
    num_rows = reader.num_rows if num_rows is None else num_rows
    offsets = hashlib.sha256()
    for block in reader.offsets_sample(num_rows):
        offsets.update(block.tobytes())
    return {
        "kind": reader.kind,
        "num_rows": num_rows,
        "size_bytes": sum(os.stat(path).st_size for path in reader.paths),
        "fingerprint": reader.fingerprint_of(num_rows),
        "offsets_hash": offsets.hexdigest(),
        "sample_hash": _sample_hash(reader, num_rows),
    }


def prefix_fingerprint(reader: PromptsReader, num_rows: int | None = None) -> str:
    """One string that stands for the first `num_rows` rows (default all): what `RunIdentity.input_fingerprint` holds.

    Made of the kind and of fingerprint, offsets_hash and sample_hash of `identity_of`; rows appended later leave it as
    it was.
    """
    identity = identity_of(reader, num_rows)
    identity.pop("size_bytes")
    return f"sha256:{hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()}"


def _sample_hash(reader: PromptsReader, num_rows: int) -> str:
    digest = hashlib.sha256()
    if num_rows <= _SAMPLED_PLACES * _ROWS_A_PLACE:
        ranges = [(0, num_rows)]
    else:
        places = np.linspace(0, num_rows - _ROWS_A_PLACE, _SAMPLED_PLACES).astype(int).tolist()
        ranges = [(place, place + _ROWS_A_PLACE) for place in places]
    for start, stop in ranges:
        for row in reader.rows(start, stop):
            # Error texts may be reworded by a later version; that a row is bad stays.
            content = "bad" if row.error is not None else row.text if row.text is not None else row.token_ids.tolist()
            if row.continuation is not None:
                content = [content, row.continuation if row.text is not None else row.continuation.tolist()]
            digest.update(json.dumps([row.row, content, dict(row.overrides)], sort_keys=True).encode())
    return digest.hexdigest()


def check_identity(stored: dict[str, Any], reader: PromptsReader) -> int:
    """Compares a stored identity with the input as it is now.

    Returns:
        The number of rows that the input has gained at its end; 0 when it is the same.
    Raises:
        RunDirectoryError: it is another input, and in what it differs.
    """
    try:
        old_rows = int(stored["num_rows"])
        known = {key: stored[key] for key in ("kind", "size_bytes", "fingerprint", "offsets_hash", "sample_hash")}
    except (KeyError, TypeError, ValueError) as error:
        raise RunDirectoryError("the stored identity of the input is not readable", found=str(error)) from error
    where = ", ".join(reader.paths[:3])
    if reader.num_rows < old_rows:
        raise _another_input(where, f"{reader.num_rows} rows where there were {old_rows}")
    try:
        now = identity_of(reader, old_rows)
    except DataError as error:
        raise _another_input(where, str(error)) from error
    compared = ["kind", "offsets_hash", "sample_hash", "fingerprint"]
    if reader.num_rows == old_rows and not known["fingerprint"]:
        # Nothing has hashed the whole content; files of another size are other files.
        compared.append("size_bytes")
    differing = [f"{key} {known[key]} is now {now[key]}" for key in compared if known[key] != now[key]]
    if differing:
        raise _another_input(where, "; ".join(differing))
    return reader.num_rows - old_rows


def _another_input(where: str, found: str) -> RunDirectoryError:
    return RunDirectoryError(
        f"{where} is not the input that this run began with",
        found=found,
        fix="give the same prompts, or start another run directory (rows may only be added at the end)",
    )
