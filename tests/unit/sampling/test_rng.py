"""The keyed draws: known answers of the generator, and that a draw depends on its key alone."""

from __future__ import annotations

import numpy as np
import pytest

from hpcinfer.sampling.rng import _philox, keyed_uniform


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known-answer vectors published with Philox4x32-10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB)),
    ],
)
def test_known_answers(counter, key, words):
    arrays = [np.array([word], np.uint64) for word in (*counter, *key)]
    first, second = _philox(tuple(arrays[:4]), (arrays[4], arrays[5]))
    assert (int(first[0]), int(second[0])) == words


def test_a_draw_does_not_depend_on_the_batch():
    rows = np.arange(1000, dtype=np.uint64)
    together = keyed_uniform(np.full(1000, 3, np.uint64), rows, rows % 4, rows + 7)
    alone = [keyed_uniform([3], [row], [row % 4], [row + 7])[0] for row in range(1000)]
    np.testing.assert_array_equal(together, alone)


def test_every_part_of_the_key_matters_up_to_its_last_bit():
    base = dict(seeds=[1], rows=[2], samples=[3], positions=[4])
    draws = {float(keyed_uniform(**base)[0])}
    for name, values in (("seeds", (0, 2**62)), ("rows", (3, 2**63)), ("samples", (4, 2**31)), ("positions", (5, 2**31))):
        draws |= {float(keyed_uniform(**(base | {name: [value]}))[0]) for value in values}
    assert len(draws) == 9


def test_draws_are_uniform():
    rows = np.arange(200_000, dtype=np.uint64)
    zeros = np.zeros_like(rows)
    draws = keyed_uniform(zeros, rows, zeros, zeros)
    assert draws.min() >= 0 and draws.max() < 1
    counts, _ = np.histogram(draws, bins=50, range=(0, 1))
    # Chi-square with 49 degrees of freedom: above 100 with probability 2e-5; the draws are fixed, so this cannot flicker.
    assert ((counts - 4000) ** 2 / 4000).sum() < 100
