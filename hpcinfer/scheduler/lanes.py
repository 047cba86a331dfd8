"""The pages of all lanes: who holds which, which lane owns a sequence, and what a starved sequence was promised."""

from __future__ import annotations

import array
import zlib

from hpcinfer.kvcache.blocks import BlockManager
from hpcinfer.scheduler.limits import SchedulerLimits
from hpcinfer.scheduler.sequence import Sequence


class LanePages:
    """One block manager a lane, and the running sequences that each lane owns."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.lanes = [
            BlockManager(limits.num_blocks, limits.block_size, release_lag=limits.lag) for _ in range(limits.num_lanes)
        ]
        self.num_running = [0] * limits.num_lanes
        """Running sequences that each lane owns."""
        self.num_owned = [0] * limits.num_lanes
        """Pages of each lane that running sequences of its own hold; what it lends to the prefill of others is not."""
        self.promised = [0] * limits.num_lanes
        """Pages that starved decodes of each lane wait for; until they have them the lane takes no new sequence."""
        self._digest = 0

    @property
    def capacity(self) -> int:
        """Pages of one lane."""
        return self.lanes[0].capacity

    @property
    def num_free(self) -> int:
        """Pages of all lanes that can be handed out now."""
        return sum(lane.num_free for lane in self.lanes)

    @property
    def num_resting(self) -> int:
        """Pages of all lanes that cannot be handed out yet."""
        return sum(lane.num_resting for lane in self.lanes)

    @property
    def state(self) -> tuple[int, ...]:
        """For the hash of the scheduler's state."""
        return (self._digest, *(lane.num_free for lane in self.lanes), *self.num_running, *self.promised)

    def blocks_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens fill."""
        return self.lanes[0].blocks_for(num_tokens)

    def next_owner(self) -> int:
        """The lane with most pages that its own sequences leave; of equals the one that owns fewest, then the lowest.

        Free pages alone would not do: all lanes lend the same to a shared prefill, and what was lent rests for a while.
        """
        if len(self.lanes) == 1:
            return 0
        return min(range(len(self.lanes)), key=lambda i: (self.num_owned[i], self.num_running[i], i))

    def can_admit(self, lane: int, count: int) -> bool:
        """Whether `lane` may take a new sequence of `count` pages."""
        return not self.promised[lane] and count <= self.lanes[lane].num_free

    def advance(self, tick: int) -> None:
        """Make the pages usable whose rest is over at `tick`."""
        for lane in self.lanes:
            lane.advance(tick)

    def take(self, sequence: Sequence, lane: int, count: int) -> None:
        """Give `sequence` pages of `lane`; the caller has checked that they are free."""
        blocks = array.array("i", self.lanes[lane].allocate(count))
        self._digest = zlib.crc32(blocks.tobytes(), self._digest + lane)
        sequence.tables[lane].extend(blocks)
        if lane == sequence.owner:
            self.num_owned[lane] += count

    def give_back(self, sequence: Sequence, tick: int, *, but: int = -1) -> None:
        """Take the pages of `sequence` back in all lanes but one."""
        for lane, table in enumerate(sequence.tables):
            if table and lane != but:
                self.lanes[lane].release(table, tick)
                if lane == sequence.owner:
                    self.num_owned[lane] -= len(table)
                sequence.tables[lane] = array.array("i")
