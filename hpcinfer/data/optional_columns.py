"""Columns of generations that only some runs have: log-probabilities, scores, embeddings.

A table or file has such a column where one of its rows has a value for it. Shapes: R rows; a ragged column holds the values
of all rows end to end, those of a row with k values a token being its [T, k] in row-major order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hpcinfer.request import Generation, TextScore, TokenLogprobs

OPTIONAL_SCALARS = {"score": np.dtype("f8"), "n_scored_tokens": np.dtype("i4"), "perplexity": np.dtype("f8")}
OPTIONAL_RAGGED = {
    "logprobs": np.dtype("f4"), "top_token_ids": np.dtype("i4"), "top_logprobs": np.dtype("f4"),
    "prompt_logprobs": np.dtype("f4"), "prompt_top_token_ids": np.dtype("i4"), "prompt_top_logprobs": np.dtype("f4"),
    "embedding": np.dtype("f4"),
}
OPTIONAL_OFFSETS = {
    "logprobs": "logprob_offsets", "top_token_ids": "top_token_offsets", "top_logprobs": "top_logprob_offsets",
    "prompt_logprobs": "prompt_logprob_offsets", "prompt_top_token_ids": "prompt_top_token_offsets",
    "prompt_top_logprobs": "prompt_top_logprob_offsets", "embedding": "embedding_offsets",
}
"""Ragged column -> the data set with its offsets, int64 [R + 1]."""
OPTIONAL_COLUMNS = (*OPTIONAL_SCALARS, *OPTIONAL_RAGGED)


def missing_value(name: str) -> float | int:
    """What a scalar column holds in rows without a value: NaN, or 0 for a count."""
    return np.nan if OPTIONAL_SCALARS[name].kind == "f" else 0


def values_of(generations: Sequence[Generation]) -> dict[str, list[Any]]:
    """Column -> a value for each row (1-D arrays in ragged columns), for the columns in which one of them has one."""
    rows = [_values(generation) for generation in generations]
    columns: dict[str, list[Any]] = {}
    for name in OPTIONAL_COLUMNS:
        if any(name in row for row in rows):
            empty = np.empty(0, OPTIONAL_RAGGED[name]) if name in OPTIONAL_RAGGED else missing_value(name)
            columns[name] = [row.get(name, empty) for row in rows]
    return columns


def num_bytes(generation: Generation) -> int:
    """About the memory that its optional values take."""
    parts = [logprobs for logprobs in (generation.logprobs, generation.prompt_logprobs) if logprobs is not None]
    return sum(4 * (len(part) + 2 * part.top.size) for part in parts) + (
        0 if generation.embedding is None else generation.embedding.nbytes
    )


def of_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The optional fields of a Generation, from the values of one row: column -> number or 1-D array."""
    fields: dict[str, Any] = {}
    for field, prefix in (("logprobs", ""), ("prompt_logprobs", "prompt_")):
        chosen = row.get(f"{prefix}logprobs", ())
        if len(chosen):
            shape = (len(chosen), -1)
            ids, top = row.get(f"{prefix}top_token_ids", ()), row.get(f"{prefix}top_logprobs", ())
            if not len(ids):
                ids, top, shape = np.empty(0, np.int32), np.empty(0, np.float32), (len(chosen), 0)
            # Copies, so that a kept row does not keep the table.
            fields[field] = TokenLogprobs(chosen.copy(), ids.reshape(shape).copy(), top.reshape(shape).copy())
    if row.get("n_scored_tokens", 0):
        fields["score"] = TextScore(float(row["score"]), int(row["n_scored_tokens"]))
    if len(row.get("embedding", ())):
        fields["embedding"] = row["embedding"].copy()
    return fields


def json_values(generation: Generation, names: Iterable[str]) -> dict[str, Any]:
    """Values of some optional columns as JSON has them: lists, of lists where there are k a token; None for NaN and for what the
    row does not have.
    """
    values = _values(generation)
    for prefix, logprobs in (("", generation.logprobs), ("prompt_", generation.prompt_logprobs)):
        if logprobs is not None and logprobs.top.size:
            values |= {f"{prefix}top_token_ids": logprobs.top_ids, f"{prefix}top_logprobs": logprobs.top}
    return {name: _plain(values.get(name)) for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()] if value.dtype.kind == "f" else value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _values(generation: Generation) -> dict[str, Any]:
    """Column -> value, for those that the row has."""
    values: dict[str, Any] = {}
    for prefix, logprobs in (("", generation.logprobs), ("prompt_", generation.prompt_logprobs)):
        if logprobs is not None:
            values[f"{prefix}logprobs"] = logprobs.chosen
            if logprobs.top.size:
                values[f"{prefix}top_token_ids"] = logprobs.top_ids.ravel()
                values[f"{prefix}top_logprobs"] = logprobs.top.ravel()
    if generation.score is not None:
        score = generation.score
        values |= {"score": score.logprob, "n_scored_tokens": score.num_tokens, "perplexity": score.perplexity}
    if generation.embedding is not None:
        values["embedding"] = generation.embedding
    return values
