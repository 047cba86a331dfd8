"""The block manager: which pages of the K/V cache are free. Host arithmetic only; the pool holds the memory."""

from __future__ import annotations

import collections


class BlockManager:
    """Hands out page numbers 1 to num_blocks - 1; page 0 is never owned, so that padding may point at it.

    A page released at tick t can be handed out again from tick t + release_lag on: work of earlier ticks that is still
    in flight may be reading it.

    Args:
        num_blocks: pages in the pool, page 0 included.
        block_size: tokens a page holds.
        release_lag: ticks a released page rests.
    """

    def __init__(self, num_blocks: int, block_size: int, release_lag: int) -> None:
        self.block_size = block_size
        self.capacity = num_blocks - 1
        self._release_lag = release_lag
        self._free = collections.deque(range(1, num_blocks))
        self._resting: collections.deque[tuple[int, int]] = collections.deque()  # (usable from tick, page)

    @property
    def num_free(self) -> int:
        """Pages that can be handed out now."""
        return len(self._free)

    @property
    def num_resting(self) -> int:
        """Pages released that cannot be handed out yet."""
        return len(self._resting)

    def blocks_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens fill."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages; the caller has checked `num_free`."""
        assert count <= len(self._free), (count, len(self._free))
        return [self._free.popleft() for _ in range(count)]

    def release(self, blocks: list[int], tick: int) -> None:
        """Give pages back at `tick`."""
        self._resting.extend((tick + self._release_lag, block) for block in blocks)

    def advance(self, tick: int) -> None:
        """Make the pages usable whose rest is over at `tick`. Ticks only grow."""
        while self._resting and self._resting[0][0] <= tick:
            self._free.append(self._resting.popleft()[1])
