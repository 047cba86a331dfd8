"""The block manager: every page has one owner, and rests after its release."""

from __future__ import annotations

from hpcinfer.kvcache.blocks import BlockManager


def test_page_zero_is_never_handed_out_and_no_page_twice():
    blocks = BlockManager(6, 4, release_lag=1)
    assert blocks.capacity == blocks.num_free == 5
    assert sorted(blocks.allocate(2) + blocks.allocate(3)) == [1, 2, 3, 4, 5]
    assert blocks.num_free == 0


def test_a_released_page_rests_for_the_lag():
    blocks = BlockManager(4, 4, release_lag=3)
    held = blocks.allocate(3)
    blocks.release(held[:2], tick=5)
    blocks.release(held[2:], tick=6)
    for tick, (free, resting) in {7: (0, 3), 8: (2, 1), 9: (3, 0)}.items():
        blocks.advance(tick)
        assert (blocks.num_free, blocks.num_resting) == (free, resting)
    assert blocks.allocate(3) == held


def test_pages_for_tokens():
    blocks = BlockManager(4, 16, release_lag=1)
    assert [blocks.blocks_for(n) for n in (0, 1, 16, 17, 32)] == [0, 1, 1, 2, 2]
