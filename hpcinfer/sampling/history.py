"""What logits processors know of one sequence, kept between its draws by the rank that draws for it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from hpcinfer.request import Request


class Tally:
    """Distinct tokens in the order of their first coming, and how often each came."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._columns = np.zeros((2, 32), np.int32)

    def add(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            place = self._places.get(token)
            if place is None:
                place = self._places[token] = len(self._places)
                if place == self._columns.shape[1]:
                    self._columns = np.concatenate((self._columns, np.zeros_like(self._columns)), axis=1)
                self._columns[0, place] = token
            self._columns[1, place] += 1

    @property
    def ids(self) -> np.ndarray:
        """int32 [distinct tokens]; until the next `add`."""
        return self._columns[0, : len(self._places)]

    @property
    def counts(self) -> np.ndarray:
        """int32, of each of `ids`; until the next `add`."""
        return self._columns[1, : len(self._places)]


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
        self.bias_ids = np.fromiter(bias.keys(), np.int32, len(bias))
        self.bias_values = np.fromiter(bias.values(), np.float32, len(bias))
        bad_words = request.bad_words_token_ids
        self._bad_alone = {ids[0] for ids in bad_words if len(ids) == 1}
        self._bad_always = np.array(sorted(self._bad_alone), np.int32)
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

    def bad_now(self) -> np.ndarray:
        """int32: tokens that would complete a bad word now, each once."""
        tokens, completing = self.tokens, set()
        for start, last in self._bad_after.get(tokens[-1], ()) if self._bad_after else ():
            if last not in self._bad_alone and tokens[-len(start) :] == start:
                completing.add(last)
        return np.array([*self._bad_always, *sorted(completing)], np.int32) if completing else self._bad_always
