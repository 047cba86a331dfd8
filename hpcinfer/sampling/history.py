"""What logits processors know of one sequence, kept between its draws by the rank that draws for it."""

from __future__ import annotations

import array
from collections.abc import Iterable, Iterator

import numpy as np

from hpcinfer.request import Request


class Tally:
    """Distinct tokens in the order of their first coming, and how often each came."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._ids = array.array("q")
        self._counts = array.array("q")

    def add(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            place = self._places.setdefault(token, len(self._ids))
            if place == len(self._ids):
                self._ids.append(token)
                self._counts.append(1)
            else:
                self._counts[place] += 1

    @property
    def ids(self) -> np.ndarray:
        """int64 [distinct tokens]."""
        return np.array(self._ids, np.int64)

    @property
    def counts(self) -> np.ndarray:
        """int64, of each of `ids`."""
        return np.array(self._counts, np.int64)


class History:
    """A function of the request and of the known tokens, whatever happened in between: preemption, another rank, an earlier life.

    A processor that keeps something of its own between two draws of a sequence keeps it here.

    Args:
        request: of the sequence.
    """

    def __init__(self, request: Request) -> None:
        sampling = request.sampling
        self.request = request
        self.tokens: list[int] = []
        """Known token ids, prompt first. For a request that `needs_history` all that come before the next draw."""
        self.everything = Tally()
        """Of prompt and output; only kept where there is a repetition penalty."""
        self.output = Tally()
        """Of the output; only kept where there is a presence or a frequency penalty."""
        self._num_prompt = len(request.prompt_token_ids)
        self._num_seen = 0
        self._repetition = sampling.repetition_penalty != 1.0
        self._presence = sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        bias = sampling.logit_bias
        self.bias_ids = np.fromiter(bias.keys(), np.int64, len(bias))
        self.bias_values = np.fromiter(bias.values(), np.float32, len(bias))
        bad_words = request.bad_words_token_ids
        self.bad_ids = np.array(sorted({ids[0] for ids in bad_words if len(ids) == 1}), np.int64)
        """Bad words of one token."""
        self._bad_after: dict[int, list[tuple[list[int], int]]] = {}
        for *start, last in (ids for ids in bad_words if len(ids) > 1):
            self._bad_after.setdefault(start[-1], []).append((start, last))

    def advance(self, tokens: list[int]) -> None:
        """Take in what is new in the known token ids of the sequence; `tokens` may grow, and else stays as it is."""
        self.tokens = tokens
        start, self._num_seen = self._num_seen, len(tokens)
        if self._repetition:
            self.everything.add(tokens[start:])
        if self._presence:
            self.output.add(tokens[max(start, self._num_prompt) :])

    def bad_now(self) -> Iterator[int]:
        """Tokens that would complete a bad word of several; those of one are `bad_ids`."""
        tokens = self.tokens
        for start, last in self._bad_after.get(tokens[-1], ()) if self._bad_after else ():
            if tokens[-len(start) :] == start:
                yield last
