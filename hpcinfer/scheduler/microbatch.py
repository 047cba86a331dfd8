"""A step as the arrays of one lane, and what all lanes draw and read in it.

Shape letters: N entries in the microbatch, T tokens in it, B blocks in the longest block table, X shared tokens of all
lanes together, S block size.
"""

from __future__ import annotations

import array
from collections.abc import Sequence as Items

import numpy as np

from hpcinfer.batch import MicroBatch, Step
from hpcinfer.scheduler.reading import asked_of, reading_of, spans_of
from hpcinfer.scheduler.work import Piece, Work, drawing


def build_step(parts: Items[Work], lane: int, *, tick: int, block_size: int) -> Step:
    """The step of one or two parts for the ranks of `lane`."""
    drawn = drawing(parts)
    asked, num_asked_top = asked_of(drawn)
    scored, num_scored_top, pooled = spans_of(parts)
    return Step(
        tick=tick,
        parts=tuple(
            build_microbatch(part, lane, tick=tick, part=index, block_size=block_size, num_scored_top=num_scored_top)
            for index, part in enumerate(parts)
        ),
        drawing=tuple([tuple([sequence.id for sequence in sequences]) for sequences in drawn]),
        asked=asked,
        num_asked_top=num_asked_top,
        scored=scored,
        num_scored_top=num_scored_top,
        pooled=pooled,
    )


def build_microbatch(
    work: Work, lane: int, *, tick: int, part: int, block_size: int, num_scored_top: int = 0
) -> MicroBatch:
    """What the ranks of `lane` compute of one part of a step."""
    num_lanes = len(work.local)
    runs = work.runs() if work.shared else [[] for _ in range(num_lanes)]
    entries = [*runs[lane], *work.local[lane]] if work.shared else work.local[lane]
    if entries:
        sequences, starts, query_lens, samples = zip(*entries, strict=True)
    else:
        sequences = starts = query_lens = samples = ()
    own = _tokens(work.local[lane])
    if own == len(work.local[lane]) and not work.shared:
        token_ids = [sequence.input_token(start) for sequence, start in zip(sequences, starts, strict=True)]
    else:
        token_ids = []
        for piece in entries:
            known = piece.sequence.tokens[piece.start : piece.start + piece.num_tokens]
            token_ids += known or [piece.sequence.input_token(piece.start)]
    shared_lens = tuple(map(_tokens, runs)) if work.shared else (0,) * num_lanes
    locals_ = [own if i == lane else _tokens(pieces) for i, pieces in enumerate(work.local)]
    return MicroBatch(
        tick=tick,
        part=part,
        is_prefill=work.is_prefill,
        sequence_ids=tuple([sequence.id for sequence in sequences]),
        token_ids=np.array(token_ids, np.int32),
        query_lens=np.array(query_lens, np.int32),
        context_lens=np.array(starts, np.int32),
        block_tables=_rectangle([sequence.tables[lane] for sequence in sequences]),
        samples=np.array(samples, bool),
        num_prefill_tokens=sum(piece.num_tokens for piece in entries if piece.is_prefill) if work.is_prefill else 0,
        lane_tokens=tuple([shared + local for shared, local in zip(shared_lens, locals_, strict=True)]),
        shared_lens=shared_lens if work.shared else (),
        shared_slots=_slots([run for lane_runs in runs for run in lane_runs], lane, block_size),
        reading=reading_of(entries, num_scored_top) if work.is_prefill else None,
    )


def _tokens(pieces: list[Piece]) -> int:
    return sum([piece[2] for piece in pieces])  # piece.num_tokens; by its index, as this runs over every decode


def _rectangle(tables: list[array.array[int]]) -> np.ndarray:
    """N tables -> int32 [N, B], padded with 0. Joined as bytes: row by row costs more than all the rest."""
    if not tables:
        return np.empty((0, 0), np.int32)
    width = max(map(len, tables))
    num_bytes = 4 * width
    joined = bytearray().join([table.tobytes().ljust(num_bytes, b"\0") for table in tables])
    return np.frombuffer(joined, np.int32).reshape(len(tables), width)


def _slots(runs: list[Piece], lane: int, block_size: int) -> np.ndarray:
    """int64 [X]: block * S + offset in the pages of `lane` of every token of `runs`."""
    slots = [np.empty(0, np.int64)]
    for run in runs:
        positions = np.arange(run.start, run.start + run.num_tokens)
        table = np.array(run.sequence.tables[lane], np.int64)
        slots.append(table[positions // block_size] * block_size + positions % block_size)
    return np.concatenate(slots)
