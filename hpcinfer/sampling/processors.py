"""Logits processors: what changes the logits of single sequences before temperature and filters.

A processor is a function that looks, on the host and when a step is planned, at the sequences that draw in it, and returns
an edit for the logits of that step, or None where nobody asks for it. Their order is that of transformers' `generate`; where
transformers has no such processor (presence and frequency penalty) it is vLLM's: after the repetition penalty.

Shape letters: S sequences that draw, V vocabulary, E entries of the logits that an edit changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from hpcinfer.request import Request
from hpcinfer.sampling.history import History


class Draw(NamedTuple):
    """A sequence that draws a token in a step."""

    request: Request
    position: int
    """Of the token to draw, counted from the start of the prompt."""
    history: History | None = None
    """Of a sequence whose logits are edited; None leaves them as they are."""

    @property
    def num_output_tokens(self) -> int:
        """Output tokens before the one to draw."""
        return self.position - len(self.request.prompt_token_ids)


class Edit(Protocol):
    """A change of logits."""

    def apply(self, logits: torch.Tensor) -> None:
        """Change float32 [S, V] in place, without waiting for its device."""


Processor = Callable[[Sequence[tuple[int, Draw]], frozenset[int]], Edit | None]
"""([(row of the logits, its draw)], the model's end-of-sequence ids) -> the edit. Every draw has a history."""


@dataclasses.dataclass(frozen=True, slots=True)
class Entries:
    """Single entries of the logits, each at most once."""

    rows: np.ndarray
    """int64 [E]."""
    ids: np.ndarray
    """int64 [E]: token ids."""
    values: np.ndarray
    """float32 [E]: what is done with each."""

    @classmethod
    def of(cls, parts: Sequence[tuple[int, np.ndarray, np.ndarray | float]]) -> Entries | None:
        """From (row, ids, values or one value for all of them) of every sequence; None where there are none."""
        parts = [part for part in parts if len(part[1])]
        if not parts:
            return None
        lengths = [len(ids) for _, ids, _ in parts]
        values = [np.broadcast_to(np.asarray(values, np.float32), ids.shape) for _, ids, values in parts]
        return cls(
            np.repeat(np.array([row for row, _, _ in parts], np.int64), lengths),
            np.concatenate([ids for _, ids, _ in parts]),
            np.concatenate(values),
        )

    def on(self, logits: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """(rows, ids), values on the device of `logits`. Ids outside the vocabulary, which no token can have, are left out."""
        inside = self.ids < logits.shape[-1]
        arrays = (self.rows, self.ids, self.values)
        if not inside.all():
            arrays = tuple(array[inside] for array in arrays)
        rows, ids, values = (torch.from_numpy(array).to(logits.device, non_blocking=True) for array in arrays)
        return (rows, ids), values


@dataclasses.dataclass(frozen=True, slots=True)
class Added(Entries):
    """Values that are added to logits."""

    def apply(self, logits: torch.Tensor) -> None:
        places, values = self.on(logits)
        logits[places] = logits[places] + values


@dataclasses.dataclass(frozen=True, slots=True)
class Repeated(Entries):
    """Repetition penalties, by which positive logits are divided and others multiplied."""

    def apply(self, logits: torch.Tensor) -> None:
        places, values = self.on(logits)
        before = logits[places]
        logits[places] = torch.where(before < 0, before * values, before / values)


@dataclasses.dataclass(frozen=True, slots=True)
class RuledOut(Entries):
    """Tokens that must not be drawn."""

    def apply(self, logits: torch.Tensor) -> None:
        places, _ = self.on(logits)
        logits[places] = -torch.inf


def bias(draws: Sequence[tuple[int, Draw]], eos_token_ids: frozenset[int]) -> Edit | None:
    """logit_bias, as SequenceBiasLogitsProcessor with sequences of one token."""
    return Added.of([(row, draw.history.bias_ids, draw.history.bias_values) for row, draw in draws])


def repetition(draws: Sequence[tuple[int, Draw]], eos_token_ids: frozenset[int]) -> Edit | None:
    """repetition_penalty, as RepetitionPenaltyLogitsProcessor."""
    return Repeated.of(
        [(row, draw.history.everything.ids, draw.request.sampling.repetition_penalty) for row, draw in draws]
    )


def counts(draws: Sequence[tuple[int, Draw]], eos_token_ids: frozenset[int]) -> Edit | None:
    """presence_penalty and frequency_penalty."""
    parts = []
    for row, draw in draws:
        sampling, tally = draw.request.sampling, draw.history.output
        parts.append((row, tally.ids, -(sampling.presence_penalty + sampling.frequency_penalty * tally.counts)))
    return Added.of(parts)


def bad_words(draws: Sequence[tuple[int, Draw]], eos_token_ids: frozenset[int]) -> Edit | None:
    """bad_words, as NoBadWordsLogitsProcessor."""
    parts = []
    for row, draw in draws:
        ids = {*draw.history.bad_now()}.difference(draw.history.bad_ids.tolist())
        parts.append((row, np.array([*draw.history.bad_ids, *sorted(ids)], np.int64), 0.0))
    return RuledOut.of(parts)


def minimum(draws: Sequence[tuple[int, Draw]], eos_token_ids: frozenset[int]) -> Edit | None:
    """min_tokens, as MinNewTokensLengthLogitsProcessor, for end-of-sequence and stop ids."""
    parts = []
    for row, draw in draws:
        sampling = draw.request.sampling
        if draw.num_output_tokens < sampling.min_tokens:
            parts.append((row, np.array(sorted(eos_token_ids.union(sampling.stop_token_ids)), np.int64), 0.0))
    return RuledOut.of(parts)


PROCESSORS: tuple[Processor, ...] = (bias, repetition, counts, bad_words, minimum)
"""In the order in which their edits are applied."""


def edits_of(draws: Sequence[Draw], eos_token_ids: frozenset[int]) -> tuple[Edit, ...]:
    """The edits of a step's logits, in order; none where no sequence asks for any."""
    edited = [(row, draw) for row, draw in enumerate(draws) if draw.history is not None]
    if not edited:
        return ()
    return tuple(edit for processor in PROCESSORS if (edit := processor(edited, eos_token_ids)) is not None)
