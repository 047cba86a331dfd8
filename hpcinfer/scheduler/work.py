"""The work of a step on all lanes, as a list of pieces: how it is cut into two parts and spread over the lanes.

Everything here is the same on all ranks of a replica, whichever lane they are in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Items
from typing import NamedTuple

from hpcinfer.scheduler.sequence import Sequence


class Piece(NamedTuple):
    """Consecutive tokens of one sequence."""

    sequence: Sequence
    start: int
    """Position of the first token."""
    num_tokens: int
    draws: bool
    """Whether a new token is drawn after the last one."""

    def part(self, offset: int, num_tokens: int) -> Piece:
        """`num_tokens` of its tokens from `offset` on; the last of them draws if this one does."""
        return Piece(
            self.sequence, self.start + offset, num_tokens, self.draws and offset + num_tokens == self.num_tokens
        )

    @property
    def is_prefill(self) -> bool:
        return self.start < self.sequence.prefill_end


@dataclasses.dataclass(slots=True)
class Work:
    """What one part of a step, or the whole step, computes."""

    shared: list[Piece]
    """Pieces that are spread over all lanes."""
    local: list[list[Piece]]
    """Of every lane the pieces that it computes alone: decodes first, then prefill."""

    @classmethod
    def nothing(cls, num_lanes: int) -> Work:
        return cls([], [[] for _ in range(num_lanes)])

    def entries(self) -> list[list[Piece]]:
        """Of every lane what it computes, in the order of its tokens: its runs of shared pieces first."""
        if not self.shared:
            return self.local
        return [runs + pieces for runs, pieces in zip(self.runs(), self.local, strict=True)]

    @property
    def pieces(self) -> list[Piece]:
        """All of them, shared ones first, then lane by lane."""
        if len(self.local) == 1:
            return self.local[0]
        return self.shared + [piece for pieces in self.local for piece in pieces]

    @property
    def is_prefill(self) -> bool:
        """False where all of it is decodes."""
        return bool(self.shared) or any(pieces and pieces[-1].is_prefill for pieces in self.local)

    @property
    def has_decodes(self) -> bool:
        return any(pieces and not pieces[0].is_prefill for pieces in self.local)

    def tokens_of(self, lane: int) -> int:
        """Tokens that `lane` computes."""
        return sum(piece.num_tokens for piece in self.local[lane]) + self.shared_tokens_of(lane)

    def shared_tokens_of(self, lane: int) -> int:
        """Those of them that come from pieces spread over the lanes."""
        return sum(sum(run.num_tokens for run in runs_of(piece, lane, len(self.local))) for piece in self.shared)

    def runs(self) -> list[list[Piece]]:
        """The shared pieces spread over the lanes: of every lane its runs, in the order of its tokens."""
        num_lanes = len(self.local)
        return [[run for piece in self.shared for run in runs_of(piece, i, num_lanes)] for i in range(num_lanes)]


def runs_of(piece: Piece, lane: int, num_lanes: int) -> list[Piece]:
    """What `lane` computes of a piece that is spread over the lanes: one run, two, or in a small piece none.

    The piece is cut into 2 x `num_lanes` nearly equal runs; lane i takes the i-th from the front and the i-th from the
    back. A token attends to all before it: early runs are cheap and late ones dear, so that the two together cost every
    lane the same.
    """
    runs = []
    num_runs = 2 * num_lanes
    for index in (lane, num_runs - 1 - lane):
        begin, end = (_run_start(piece.num_tokens, number, num_runs) for number in (index, index + 1))
        if begin == end:
            continue
        if runs and runs[-1].start + runs[-1].num_tokens == piece.start + begin:
            first = runs.pop()
            begin = first.start - piece.start
        runs.append(piece.part(begin, end - begin))
    return runs


def divide(work: Work) -> tuple[Work, ...]:
    """Cut the work in two parts so that each lane has nearly the same number of tokens in both; one part if that fails.

    Order is kept: what comes first in a list goes to part 0. At most one shared piece is cut, and in each lane at most
    one of its own.
    """
    num_lanes = len(work.local)
    first, second = Work.nothing(num_lanes), Work.nothing(num_lanes)
    half = sum(piece.num_tokens for piece in work.shared) // 2
    # A multiple of the lanes, so that the two parts together load no lane with more than the whole would.
    first.shared, second.shared = _cut(work.shared, half, num_lanes)
    for lane, pieces in enumerate(work.local):
        half = -(-work.tokens_of(lane) // 2) - first.shared_tokens_of(lane)
        first.local[lane], second.local[lane] = _cut(pieces, half, 1)
    return (first, second) if first.pieces and second.pieces else (work,)


def goes_on(first: Work, second: Work) -> bool:
    """Whether the second of two parts goes on with a prompt that the first began."""
    pairs = zip([first.shared, *first.local], [second.shared, *second.local], strict=True)
    return any(before and after and before[-1].sequence is after[0].sequence for before, after in pairs)


def _cut(pieces: list[Piece], num_tokens: int, multiple: int) -> tuple[list[Piece], list[Piece]]:
    """Cut after `num_tokens` tokens; inside a piece after a multiple of `multiple` of its tokens."""
    left = num_tokens
    for index, piece in enumerate(pieces):
        if left <= 0:
            return pieces[:index], pieces[index:]
        if left < piece.num_tokens:
            offset = -(-left // multiple) * multiple
            if offset >= piece.num_tokens:  # too small to be cut; whole, it must leave something behind
                index += bool(index == 0 or index + 1 < len(pieces))
                return pieces[:index], pieces[index:]
            begun, rest = piece.part(0, offset), piece.part(offset, piece.num_tokens - offset)
            return [*pieces[:index], begun], [rest, *pieces[index + 1 :]]
        left -= piece.num_tokens
    return pieces, []


def _run_start(num_tokens: int, index: int, num_runs: int) -> int:
    """Where the index-th of `num_runs` nearly equal runs begins. Those that differ from the others by a token are the
    first ones: there a token more or less changes the cost least."""
    length, rest = divmod(num_tokens, num_runs)
    if 2 * rest <= num_runs:
        return index * length + min(index, rest)
    return index * (length + 1) - min(index, num_runs - rest)


def drawing(parts: Items[Work]) -> list[list[Sequence]]:
    """For every lane the sequences that draw a token, in the order of its entries, part 0 first."""
    drawn: list[list[Sequence]] = [[] for _ in parts[0].local]
    for part in parts:
        for lane, runs in enumerate(part.runs() if part.shared else ()):
            drawn[lane] += [run.sequence for run in runs if run.draws]
        for lane, pieces in enumerate(part.local):
            drawn[lane] += [piece.sequence for piece in pieces if piece.draws]
    return drawn
