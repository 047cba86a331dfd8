"""The rules of order that every schedule must keep, as assertions over the records of all ranks of one replica.

Each rule returns how many things it has looked at, so that a test can see that it had something to look at. Ranks are
on one host: their times are of one clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from hpcinfer.batch import MicroBatch
from hpcinfer.observe.trace import COMPUTE, TICK, TRANSFER, WAIT, Record
from tests.ranks.records import COLLECTIVES, PageEvent, RankRecords, lane_ranks

Token = tuple[int, int]
"""(sequence, position)."""


class RuleBroken(AssertionError):
    """A schedule is wrong."""


def broken_rules(ranks: Sequence[RankRecords]) -> dict[str, str]:
    """Name of each rule that does not hold -> the first thing that breaks it."""
    broken = {}
    for name, rule in RULES.items():
        try:
            rule(ranks)
        except RuleBroken as error:
            broken[name] = str(error)
    return broken


def token_before_next_step(ranks: Sequence[RankRecords]) -> int:
    """No sequence's step n + 1 starts, on any rank, before its step n's token exists; and it starts with that token."""
    lanes = lane_ranks(ranks)
    last: dict[int, tuple[int, float, int]] = {}  # sequence -> tick of its last draw, when its token existed, the token
    num_checked = 0
    begins = _begins(ranks)
    for tick in sorted(lanes[0].steps):
        begin_s = begins[tick]
        for lane in lanes.values():
            for part in lane.steps[tick].parts:
                for sequence, token in _last_inputs(part):
                    if sequence not in last:
                        continue
                    num_checked += 1
                    drawn_tick, exists_s, drawn = last[sequence]
                    what = f"sequence {sequence}: tick {tick} goes on from the token of tick {drawn_tick}"
                    early_us = 1e6 * (exists_s - begin_s)
                    _demand(early_us <= 0, f"{what} and begins {early_us:.0f} us before it exists")
                    _demand(token == drawn, f"{what}, which is {drawn}, with {token}")
        for lane, drawing in enumerate(lanes[0].steps[tick].drawing):
            if drawing:
                exists_s, tokens = _draw(ranks, tick, lane)
                for sequence, token in zip(drawing, tokens, strict=True):
                    last[sequence] = (tick, exists_s, token)
    return num_checked


def written_before_read(ranks: Sequence[RankRecords]) -> int:
    """The key and value that attention reads for a position of a sequence were written into that slot of that layer
    before, for that position, and nothing else since."""
    lanes = lane_ranks(ranks)
    num_checked = 0
    for rank in ranks:
        holds: dict[tuple[int, int], Token] = {}  # (layer, slot) -> whose it is
        written: dict[tuple[int, int], dict[int, Token]] = {}
        for event in rank.pages:
            key = (event.tick, event.part)
            if key not in written:
                written[key] = _slots_of(lanes, rank, *key)
            if event.is_write:
                holds.update(((event.layer, slot), written[key][slot]) for slot in event.slots[0].tolist())
            else:
                num_checked += _check_read(rank, event, holds)
    return num_checked


def _check_read(rank: RankRecords, event: PageEvent, holds: dict[tuple[int, int], Token]) -> int:
    part = rank.steps[event.tick].parts[event.part]
    ends = part.context_lens + part.query_lens
    lens = [len(slots) for slots in event.slots]
    _demand(lens == ends.tolist(), f"tick {event.tick} reads other lengths than it has")
    for sequence, slots in zip(part.sequence_ids, event.slots, strict=True):
        for position, slot in enumerate(slots.tolist()):
            found = holds.get((event.layer, slot))
            _demand(
                found == (sequence, position),
                f"rank {rank.mesh.rank}, tick {event.tick} part {event.part}, layer {event.layer}: position {position} "
                f"of sequence {sequence} is read from slot {slot}, which holds {found or 'nothing yet'}",
            )
    return int(ends.sum())


def no_sequence_parallelism_in_decode(ranks: Sequence[RankRecords]) -> int:
    """No rank has an operation, or a wait for one, on the sp axis in a part that is all decode."""
    num_checked = 0
    for rank in ranks:
        decodes = {(part.tick, part.part) for part in rank.parts() if not part.is_prefill}
        num_checked += len(decodes)
        for record in rank.records:
            if record.track == "sp" and record.kind in (TRANSFER, WAIT):
                allowed = (record.tick, record.part) not in decodes
                _demand(allowed, f"rank {rank.mesh.rank}: {_name(record)} in a decode")
    return num_checked


def sends_meet_receives(ranks: Sequence[RankRecords]) -> int:
    """Every send has its receive, in the same order, of the same microbatch, with the same bytes, shape and dtype."""
    num_checked = 0
    for name, members in _communicators(ranks):
        if len(members) != 2 or not (name.startswith("pp ") or name.startswith("tokens")):
            continue
        sends, receives = (
            [record for record in rank.transfers(name) if record.verb == verb]
            for rank, verb in zip(_of(ranks, members), ("send", "recv"), strict=True)
        )
        _demand(len(sends) == len(receives), f"{name!r}: {len(sends)} sends and {len(receives)} receives")
        for send, receive in zip(sends, receives, strict=True):
            num_checked += 1
            both = [(r.tick, r.part, r.name, r.bytes, r.shape, r.dtype) for r in (send, receive)]
            _demand(both[0] == both[1], f"{name!r}: the send of {both[0]} meets the receive of {both[1]}")
            _demand(receive.end_s >= send.start_s, f"{name!r}: {_name(receive)} is over before its send")
    return num_checked


def same_collectives_in_the_same_order(ranks: Sequence[RankRecords]) -> int:
    """All ranks of a communicator issued the same collectives, of the same microbatches, in the same order."""
    num_checked = 0
    for name, members in _communicators(ranks):
        orders = [
            [_identity(r) for r in rank.transfers(name) if r.verb in COLLECTIVES] for rank in _of(ranks, members)
        ]
        for member, order in zip(members[1:], orders[1:], strict=True):
            for number, (ours, theirs) in enumerate(zip(orders[0], order)):
                num_checked += 1
                found = f"{ours} on rank {members[0]}, {theirs} on rank {member}"
                _demand(ours == theirs, f"{name!r}: number {number} is {found}")
            found = f"{len(orders[0])} on rank {members[0]}, {len(order)} on rank {member}"
            _demand(len(order) == len(orders[0]), f"{name!r}: {found}")
    return num_checked


RULES: dict[str, Callable[[Sequence[RankRecords]], int]] = {
    "token before next step": token_before_next_step,
    "written before read": written_before_read,
    "no sp in decode": no_sequence_parallelism_in_decode,
    "sends meet receives": sends_meet_receives,
    "same collectives": same_collectives_in_the_same_order,
}


# -- tokens -----------------------------------------------------------------------------------------------------------


def _begins(ranks: Iterable[RankRecords]) -> dict[int, float]:
    """Tick -> when the first rank began to compute it."""
    begins: dict[int, float] = {}
    for rank in ranks:
        executes = {r.tick: r.start_s for r in rank.records if r.kind == TICK and r.name == "execute"}
        for record in rank.records:
            if record.kind == COMPUTE and record.name != "sample":
                # A segment is counted from the end of the wait before it, for the first one the wait for the message.
                begin_s = max(record.start_s, executes[record.tick])
                begins[record.tick] = min(begins.get(record.tick, begin_s), begin_s)
    return begins


def _draw(ranks: Iterable[RankRecords], tick: int, lane: int) -> tuple[float, list[int]]:
    """When the leader had the tokens that `lane` draws in `tick`, and what they are."""
    sampler = next(rank for rank in ranks if rank.mesh.is_sampler and rank.mesh.lane == lane)
    leader = next(rank for rank in ranks if rank.mesh.is_leader)
    link = f"tokens {lane}" if leader.mesh.sp > 1 else "tokens"
    if sampler is leader:
        times = [r.end_s for r in sampler.records if r.kind == COMPUTE and r.tick == tick and r.name == "sample"]
    else:  # the drawing is recorded when the send has been issued, which is later
        times = [r.end_s for r in leader.transfers(link) if r.tick == tick and r.verb == "recv"]
    return max(times), sampler.drawn[tick].tolist()


def _last_inputs(part: MicroBatch) -> list[tuple[int, int]]:
    """(sequence, its last input token) of every entry that draws."""
    ends = np.cumsum(part.query_lens) - 1
    return [
        (sequence, int(part.token_ids[end]))
        for sequence, end, draws in zip(part.sequence_ids, ends, part.samples, strict=True) if draws
    ]


# -- pages ------------------------------------------------------------------------------------------------------------


def _slots_of(lanes: dict[int, RankRecords], rank: RankRecords, tick: int, part: int) -> dict[int, Token]:
    """Slot in this rank's pages -> the token that belongs there, for all tokens that the microbatch may write."""
    mine = rank.steps[tick].parts[part]
    slots = {}
    for index, (sequence, start, count) in enumerate(_runs(mine)):
        for position in range(start, start + count):
            block = int(mine.block_tables[index, position // rank.block_size])
            slots[block * rank.block_size + position % rank.block_size] = (sequence, position)
    shared = []
    for lane, count in enumerate(mine.shared_lens):
        shared += _tokens(lanes[lane].steps[tick].parts[part])[:count]
    slots.update(zip(mine.shared_slots.tolist(), shared, strict=True))
    return slots


def _runs(part: MicroBatch) -> list[tuple[int, int, int]]:
    return list(zip(part.sequence_ids, part.context_lens.tolist(), part.query_lens.tolist(), strict=True))


def _tokens(part: MicroBatch) -> list[Token]:
    return [(sequence, position) for sequence, start, count in _runs(part) for position in range(start, start + count)]


# -- communicators ----------------------------------------------------------------------------------------------------


def _communicators(ranks: Iterable[RankRecords]) -> list[tuple[str, list[int]]]:
    """Every communicator once."""
    found = {(name, tuple(members)) for rank in ranks for name, members in rank.members.items()}
    return [(name, list(members)) for name, members in sorted(found)]


def _of(ranks: Iterable[RankRecords], members: Iterable[int]) -> list[RankRecords]:
    by_number = {rank.mesh.rank: rank for rank in ranks}
    return [by_number[member] for member in members]


def _identity(record: Record) -> tuple:
    """What must agree on all ranks. Rows of an all-to-all are each rank's own."""
    size = record.shape[1:] if record.verb == "all_to_all" else (*record.shape, record.bytes)
    return (record.tick, record.part, record.verb, record.name, record.dtype, size)


def _name(record: Record) -> str:
    return f"{record.verb} ({record.name}) of tick {record.tick} part {record.part}"


def _demand(holds: bool, problem: str) -> None:
    if not holds:
        raise RuleBroken(problem)
