"""What a step finds out beside the tokens that it draws: log-probabilities of drawn tokens and of those of prompts.

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


def scored_of(parts: Items[Work]) -> tuple[tuple[tuple[Span, ...], ...], int]:
    """`Step.scored` and `num_scored_top`."""
    lanes: list[list[Span]] = [[] for _ in parts[0].local]
    num_top = 0
    for part in parts:
        if part.is_prefill:
            for spans, pieces in zip(lanes, part.entries(), strict=True):
                for piece in pieces:
                    if (span := _scored(piece)) is not None:
                        spans.append(span)
                        num_top = max(num_top, piece.sequence.request.sampling.prompt_logprobs or 0)
    return (tuple(map(tuple, lanes)), num_top) if any(lanes) else ((), 0)


def reading_of(entries: Items[Piece], num_top: int) -> Reading | None:
    """What the last stage of a lane reads of its entries in one part of a step; None where it is nothing."""
    spans = [_scored(piece) for piece in entries]
    if not any(spans):
        return None
    targets, first = np.full(sum(piece.num_tokens for piece in entries), -1, np.int64), 0
    for piece, span in zip(entries, spans, strict=True):
        if span is not None:
            # A token is scored where the one before it is computed.
            place = first + span.start - 1 - piece.start
            targets[place : place + span.num_tokens] = piece.sequence.tokens[span.start : span.stop]
        first += piece.num_tokens
    return Reading(targets=targets, num_top=num_top)


def _scored(piece: Piece) -> Span | None:
    """The tokens of the prompt whose log-probabilities come from this piece."""
    sequence = piece.sequence
    if sequence.first_scored is None:
        return None
    start = max(piece.start + 1, sequence.first_scored)
    stop = min(piece.start + piece.num_tokens + 1, sequence.num_prompt_tokens)
    return Span(sequence.id, start, stop) if start < stop else None
