"""What one rank did in a recorded run, as plain data that travels from the ranks to the test: see `records_rank`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from hpcinfer.batch import MicroBatch, Step
from hpcinfer.observe.trace import TRANSFER, Record
from hpcinfer.parallel.mesh import Mesh

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")


class PageEvent(NamedTuple):
    """Attention touched pages of one layer. A rank's events are in the order in which they happened."""

    is_write: bool
    layer: int
    """Counted within the stage."""
    tick: int
    part: int
    slots: tuple[np.ndarray, ...]
    """Slots written, one array; or slots read, one array for each entry of the microbatch, by position from 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankRecords:
    """One rank of a replica in one case."""

    mesh: Mesh
    """As this rank sees it."""
    members: dict[str, list[int]]
    """Communicator -> its ranks."""
    layers: range
    """Of this rank's stage."""
    block_size: int
    two_batch_tokens: int
    records: list[Record]
    steps: dict[int, Step]
    """By tick: what this rank's scheduler decided."""
    pages: list[PageEvent]
    drawn: dict[int, np.ndarray]
    """By tick: the tokens that this rank drew, in the order of the step's `drawing`."""

    def transfers(self, track: str = "") -> list[Record]:
        """Operations that belong to a tick, of one communicator or of all, in the order of their issue."""
        found = [
            r for r in self.records if r.kind == TRANSFER and r.tick >= 0 and (not track or r.track == track)
        ]
        return sorted(found, key=lambda record: (record.issued_s, record.number))

    def parts(self) -> Iterator[MicroBatch]:
        """All microbatches of this rank's lane."""
        for tick in sorted(self.steps):
            yield from self.steps[tick].parts


def lane_ranks(ranks: Iterable[RankRecords]) -> dict[int, RankRecords]:
    """Lane -> one rank of it: its steps are those of every other."""
    lanes: dict[int, RankRecords] = {}
    for rank in ranks:
        lanes.setdefault(rank.mesh.lane, rank)
    return lanes
