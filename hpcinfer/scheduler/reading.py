"""What a step finds out beside the tokens that it draws: log-probabilities of them and of prompts, sums of hidden states.

All ranks of a replica come to the same: the samplers send it in this order, and the leader knows what it gets.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np

from hpcinfer.batch import Reading, Span
from hpcinfer.scheduler.sequence import Sequence
from hpcinfer.scheduler.work import Piece, Work


def asked_of(drawn: Items[Items[Sequence]]) -> tuple[tuple[tuple[int, ...], ...], int]:
    """`Step.asked` and `num_asked_top`, of the sequences that every lane draws for."""
    asked = tuple([
        tuple([place for place, sequence in enumerate(lane) if sequence.num_logprobs is not None]) for lane in drawn
    ])
    if not any(asked):
        return (), 0
    return asked, max(lane[place].num_logprobs for lane, places in zip(drawn, asked, strict=True) for place in places)


def spans_of(parts: Items[Work]) -> tuple[tuple[tuple[Span, ...], ...], int, tuple[tuple[Span, ...], ...]]:
    """`Step.scored`, `num_scored_top` and `pooled`."""
    num_lanes, num_top = len(parts[0].local), 0
    scored: list[list[Span]] = [[] for _ in range(num_lanes)]
    pooled: list[list[Span]] = [[] for _ in range(num_lanes)]
    for part in parts:
        for lane, pieces in enumerate(part.entries() if part.is_prefill else ()):
            for piece in pieces:
                if (span := _scored(piece)) is not None:
                    scored[lane].append(span)
                    num_top = max(num_top, piece.sequence.request.sampling.prompt_logprobs or 0)
                if (span := _pooled(piece)) is not None:
                    pooled[lane].append(span)
    return _or_nothing(scored), num_top, _or_nothing(pooled)


def reading_of(entries: Items[Piece], num_top: int) -> Reading | None:
    """What the last stage of a lane reads of its entries in one part of a step; None where it is nothing."""
    scored, pooled = [_scored(piece) for piece in entries], [_pooled(piece) for piece in entries]
    if not any(scored) and not any(pooled):
        return None
    targets, pools, first = np.full(sum(piece.num_tokens for piece in entries), -1, np.int64), [], 0
    for piece, span, pool in zip(entries, scored, pooled, strict=True):
        if span is not None:
            # A token is scored where the one before it is computed.
            place = first + span.start - 1 - piece.start
            targets[place : place + span.num_tokens] = piece.sequence.tokens[span.start : span.stop]
        if pool is not None:
            pools.append((first + pool.start - piece.start, first + pool.stop - piece.start))
        first += piece.num_tokens
    return Reading(targets=targets, num_top=num_top, pools=tuple(pools))


def _scored(piece: Piece) -> Span | None:
    """The tokens of the prompt whose log-probabilities come from this piece."""
    sequence = piece.sequence
    if sequence.first_scored is None:
        return None
    start = max(piece.start + 1, sequence.first_scored)
    stop = min(piece.start + piece.num_tokens + 1, sequence.num_prompt_tokens)
    return Span(sequence.id, start, stop) if start < stop else None


def _pooled(piece: Piece) -> Span | None:
    """The tokens of this piece whose hidden states are added up."""
    if piece.sequence.pooled is None:
        return None
    first, last = piece.sequence.pooled
    start, stop = max(piece.start, first), min(piece.start + piece.num_tokens, last)
    return Span(piece.sequence.id, start, stop) if start < stop else None


def _or_nothing(lanes: list[list[Span]]) -> tuple[tuple[Span, ...], ...]:
    return tuple(map(tuple, lanes)) if any(lanes) else ()
