"""Logits processors: what changes the logits of single sequences before temperature and filters.

A processor is a function that looks, on the host and when a step is planned, at the sequences that draw in it, and returns
an edit for the logits of that step, or None where nobody asks for it. Their order is that of transformers' `generate`; where
transformers has no such processor (presence and frequency penalty) it is vLLM's: after the repetition penalty.

Shape letters: S sequences that draw, V vocabulary, R rows that an edit changes, E entries of the logits that it changes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from hpcinfer.request import Request
from hpcinfer.sampling.history import History
from hpcinfer.sampling.logits import on_device


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
    """Single entries of the logits, each at most once: in R of the S rows some tokens each."""

    rows: np.ndarray
    """int64 [R]."""
    lengths: np.ndarray
    """int64 [R]: entries in each of them."""
    ids: np.ndarray
    """int32 [E]: their token ids, row after row."""

    @classmethod
    def of(cls, parts: Sequence[tuple[int, np.ndarray]]) -> Entries | None:
        """From (row, its token ids) of every sequence, all with some; None without any."""
        if not parts:
            return None
        rows, ids = zip(*parts, strict=True)
        return cls(np.array(rows, np.int64), np.array([len(each) for each in ids], np.int64), np.concatenate(ids))

    def on(self, logits: torch.Tensor, *values: np.ndarray) -> tuple[tuple[torch.Tensor, torch.Tensor], list[torch.Tensor]]:
        """On the device of `logits`: (row, token id) of each entry as int64 [E]; and of `values` [R], one a row, its row's [E]."""
        lengths, ids, rows, *each = on_device((self.lengths, self.ids, self.rows, *values), logits.device)
        # The size is given: asking the device for it would wait for it.
        spread = [torch.repeat_interleave(value, lengths, output_size=len(self.ids)) for value in (rows, *each)]
        return (spread[0], ids.long()), spread[1:]


@dataclasses.dataclass(frozen=True, slots=True)
class Added:
    """Biases that are added to logits."""

    entries: Entries
    biases: np.ndarray
    """float32 [E]."""

    def apply(self, logits: torch.Tensor) -> None:
        places, _ = self.entries.on(logits)
        logits[places] = logits[places] + on_device((self.biases,), logits.device)[0]


@dataclasses.dataclass(frozen=True, slots=True)
class Repeated:
    """Repetition penalties, by which positive logits are divided and others multiplied."""

    entries: Entries
    penalties: np.ndarray
    """float32 [R]."""

    def apply(self, logits: torch.Tensor) -> None:
        places, (penalties,) = self.entries.on(logits, self.penalties)
        before = logits[places]
        logits[places] = torch.where(before < 0, before * penalties, before / penalties)


@dataclasses.dataclass(frozen=True, slots=True)
class Counted:
    """Penalties of tokens in the output: one for being there, and one for each time."""

    entries: Entries
    counts: np.ndarray
    """int32 [E]."""
    presence: np.ndarray
    """float64 [R]."""
    frequency: np.ndarray
    """float64 [R]."""

    def apply(self, logits: torch.Tensor) -> None:
        places, (presence, frequency) = self.entries.on(logits, self.presence, self.frequency)
        (counts,) = on_device((self.counts,), logits.device)
        logits[places] = logits[places] - (presence + frequency * counts).float()


@dataclasses.dataclass(frozen=True, slots=True)
class RuledOut:
    """Tokens that must not be drawn."""

    entries: Entries

    def apply(self, logits: torch.Tensor) -> None:
        places, _ = self.entries.on(logits)
        # Ids outside the vocabulary, which no token can have, do nothing: a tokenizer may have more of them than the model.
        inside = places[1] < logits.shape[-1]
        rows, ids = places[0], torch.where(inside, places[1], 0)
        logits.view(-1).scatter_reduce_(0, rows * logits.shape[-1] + ids, torch.where(inside, -torch.inf, torch.inf), "amin")


def bias(draws: Sequence[tuple[int, Draw]], eos_token_ids: frozenset[int]) -> Edit | None:
    """logit_bias, as SequenceBiasLogitsProcessor with sequences of one token."""
    biased = [(row, draw.history) for row, draw in draws if len(draw.history.bias_ids)]
    entries = Entries.of([(row, history.bias_ids) for row, history in biased])
    return entries and Added(entries, np.concatenate([history.bias_values for _, history in biased]))


def repetition(draws: Sequence[tuple[int, Draw]], eos_token_ids: frozenset[int]) -> Edit | None:
    """repetition_penalty, as RepetitionPenaltyLogitsProcessor."""
    penalised = [(row, draw) for row, draw in draws if len(draw.history.everything.ids)]
    entries = Entries.of([(row, draw.history.everything.ids) for row, draw in penalised])
    return entries and Repeated(entries, np.array([draw.request.sampling.repetition_penalty for _, draw in penalised], np.float32))


def counts(draws: Sequence[tuple[int, Draw]], eos_token_ids: frozenset[int]) -> Edit | None:
    """presence_penalty and frequency_penalty, as vLLM has them."""
    penalised = [(row, draw) for row, draw in draws if len(draw.history.output.ids)]
    entries = Entries.of([(row, draw.history.output.ids) for row, draw in penalised])
    return entries and Counted(
        entries,
        np.concatenate([draw.history.output.counts for _, draw in penalised]),
        np.array([draw.request.sampling.presence_penalty for _, draw in penalised]),
        np.array([draw.request.sampling.frequency_penalty for _, draw in penalised]),
    )


def bad_words(draws: Sequence[tuple[int, Draw]], eos_token_ids: frozenset[int]) -> Edit | None:
    """bad_words, as NoBadWordsLogitsProcessor."""
    parts = ((row, draw.history.bad_now()) for row, draw in draws)
    entries = Entries.of([(row, ids) for row, ids in parts if len(ids)])
    return entries and RuledOut(entries)


def minimum(draws: Sequence[tuple[int, Draw]], eos_token_ids: frozenset[int]) -> Edit | None:
    """min_tokens, as MinNewTokensLengthLogitsProcessor, for end-of-sequence and stop ids."""
    early = [(row, draw) for row, draw in draws if draw.num_output_tokens < draw.request.sampling.min_tokens]
    parts = ((row, _ends(eos_token_ids, draw.request.sampling.stop_token_ids)) for row, draw in early)
    entries = Entries.of([(row, ids) for row, ids in parts if len(ids)])
    return entries and RuledOut(entries)


@functools.lru_cache(maxsize=256)
def _ends(eos_token_ids: frozenset[int], stop_token_ids: tuple[int, ...]) -> np.ndarray:
    """int32: ids that end a generation, each once."""
    return np.array(sorted(eos_token_ids.union(stop_token_ids)), np.int32)


PROCESSORS: tuple[Processor, ...] = (bias, repetition, counts, bad_words, minimum)
"""In the order in which their edits are applied."""


def edits_of(draws: Sequence[Draw], eos_token_ids: frozenset[int]) -> tuple[Edit, ...]:
    """The edits of a step's logits, in order; none where no sequence asks for any."""
    edited = [(row, draw) for row, draw in enumerate(draws) if draw.history is not None]
    if not edited:
        return ()
    return tuple(edit for processor in PROCESSORS if (edit := processor(edited, eos_token_ids)) is not None)
