"""Some rows of an input: a range, and rows drawn from it. What a trial takes."""

from __future__ import annotations

import dataclasses

import numpy as np

from hpcinfer.data.ledger.permutation import KeyedPermutation
from hpcinfer.errors import ConfigError

_KEY = 0x7472_6961_6C
"""Of the draw: fixed, so that every start with the same limit means the same rows."""


@dataclasses.dataclass(frozen=True, slots=True)
class RowSelection:
    """Rows [start, stop), or those of them in `drawn`."""

    start: int
    stop: int
    drawn: np.ndarray | None = None
    """int64 [number], sorted; None where all of the range are meant."""

    @property
    def num_rows(self) -> int:
        """Rows selected."""
        return self.stop - self.start if self.drawn is None else len(self.drawn)

    def rows_of_claims(self, num_claims: int, claim_size: int) -> np.ndarray:
        """int64 [num_claims]: selected rows in each claim."""
        if self.drawn is not None:
            return np.bincount(self.drawn // claim_size, minlength=num_claims).astype(np.int64)
        first = np.arange(num_claims, dtype=np.int64) * claim_size
        return np.maximum(np.minimum(first + claim_size, self.stop) - np.maximum(first, self.start), 0)

    def unselected_bits(self, num_rows: int, num_samples: int) -> np.ndarray:
        """u1: a bitmap over (row, sample) keys, the lowest bit of a byte first, with a 0 for each selected one."""
        num_bytes = -(-num_rows * num_samples // 8)
        bits = np.full(num_bytes, 0xFF, np.uint8)
        if self.drawn is not None:
            _clear(bits, (self.drawn[:, None] * num_samples + np.arange(num_samples)).ravel())
            return bits
        start, stop = self.start * num_samples, self.stop * num_samples
        first, last = min(-(-start // 8), stop // 8), stop // 8  # whole bytes
        bits[first:last] = 0
        _clear(bits, np.concatenate((np.arange(start, min(first * 8, stop)), np.arange(max(last * 8, start), stop))))
        return bits


def select_rows(rows: str, limit: int, num_rows: int) -> RowSelection | None:
    """The rows that `data.rows` ("a:b", "" for all) and `data.limit` (0 for all) mean in an input of `num_rows` rows; None for all.

    A range ends where the input does. The rows of a limit are the first ones of a keyed permutation of the range: spread over all of it,
    without a period that the input may have too.

    Raises:
        ConfigError: there is no such row.
    """
    first, _, last = rows.partition(":")
    start, stop = int(first or 0), min(int(last), num_rows) if last else num_rows
    if rows and start >= stop:
        raise ConfigError(f"data.rows = {rows!r} holds no row", found=f"an input of {num_rows} rows, counted from 0")
    if not limit or limit >= stop - start:
        return None if stop - start == num_rows else RowSelection(start, stop)
    order = KeyedPermutation(stop - start, _KEY)
    drawn = np.fromiter((order[i] for i in range(limit)), np.int64, limit)
    return RowSelection(start, stop, np.sort(drawn) + start)


def _clear(bits: np.ndarray, keys: np.ndarray) -> None:
    np.bitwise_and.at(bits, keys >> 3, ~np.left_shift(1, keys & 7).astype(np.uint8))
