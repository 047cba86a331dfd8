"""Keyed uniform draws: a function of (seed, row, sample, position) alone.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a counter-based generator, so that no
state travels, and any batch, layout, device or later life draws the same number for the same token.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def keyed_uniform(seeds: np.ndarray, rows: np.ndarray, samples: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One number in [0, 1) for each key.

    Args:
        seeds: uint64 [S].
        rows: uint64 [S], row in the prompts.
        samples: uint64 [S], sample of the row, below 2**32.
        positions: uint64 [S], index of the drawn token in its sequence, prompt included, below 2**32.

    Returns:
        float64 [S], of 53 random bits.
    """
    seeds, rows, samples, positions = (np.asarray(a, np.uint64) for a in (seeds, rows, samples, positions))
    counter = (rows & _LOW, rows >> _HALF, samples & _LOW, positions & _LOW)
    first, second = _philox(counter, (seeds & _LOW, seeds >> _HALF))
    bits = (first << np.uint64(21)) ^ (second >> np.uint64(11))  # 32 and 21 of the random bits: 53 together
    return bits.astype(np.float64) * 2.0**-53


def _philox(counter: tuple[np.ndarray, ...], key: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The first two 32-bit words of Philox4x32-10, as uint64 arrays."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        low_product, high_product = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (high_product >> _HALF) ^ c1 ^ k0,
            high_product & _LOW,
            (low_product >> _HALF) ^ c3 ^ k1,
            low_product & _LOW,
        )
        k0 = (k0 + np.uint64(_WEYL[0])) & _LOW
        k1 = (k1 + np.uint64(_WEYL[1])) & _LOW
    return c0, c1
