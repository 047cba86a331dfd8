"""Stop texts: found while tokens come, and cut off at the end.

Which text a generation has depends on its token ids alone: it is what the tokenizer makes of all of them, cut at the first stop
text. While tokens come only the last few of them are turned into text, so that a long generation costs as much a token as a short
one; what that finds is then looked for in the whole text. (Of tokenizers that clean up spaces, all of them are: few models have one.)
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import numpy as np

from hpcinfer.data.tokenize import Tokenizer
from hpcinfer.request import SamplingParams

_BROKEN = "\ufffd"
"""What decoders put in the place of bytes that are no character, or not yet."""
_CONTEXT = 4
"""Tokens decoded before the first new one: what a token means may depend on its neighbour, as a space at the start does."""
_WINDOW = 16
"""Tokens that a window may keep; so often broken text is looked at before it counts as read. A character has at most 4 bytes."""
_KEPT = 256
"""Different lists of stop texts that are remembered: most rows have the job's."""


def find_stop(text: str, stops: Sequence[str], after: int = 0) -> tuple[int, int] | None:
    """(start, end) in `text` of the stop text that is complete first, of those that end behind index `after`; None without any.

    Read character by character that is the one where reading would end, however the text was cut into tokens. Of two with the same
    end the longer one counts.
    """
    hits = []
    for stop in stops:
        start = text.find(stop, max(0, after - len(stop) + 1))
        if start >= 0:
            hits.append((start + len(stop), start))
    return min(hits)[::-1] if hits else None


def stop_in(tokenizer: Tokenizer, token_ids: Sequence[int] | np.ndarray, sampling: SamplingParams) -> tuple[str, tuple[int, int] | None]:
    """The whole text of an output, and where it has a stop text that counts: not one that is complete within min_tokens."""
    text = tokenizer.decode(token_ids)
    if not sampling.stop or len(token_ids) <= sampling.min_tokens:
        return text, None
    _, early = _whole(tokenizer, token_ids[: sampling.min_tokens])
    return text, find_stop(text, sampling.stop, len(early))


def _whole(tokenizer: Tokenizer, token_ids: Sequence[int] | np.ndarray) -> tuple[int, str]:
    """How many of the tokens, up to the last one after which no character is begun and not ended, and their text."""
    num_tokens = len(token_ids)
    for end in range(num_tokens, max(-1, num_tokens - _WINDOW), -1):
        text = tokenizer.decode(token_ids[:end])
        if not text.endswith(_BROKEN):
            return end, text
    return num_tokens, tokenizer.decode(token_ids)


def final_text(tokenizer: Tokenizer, token_ids: Sequence[int] | np.ndarray, sampling: SamplingParams) -> str:
    """The text of an output that has ended, cut at its stop text."""
    text, hit = stop_in(tokenizer, token_ids, sampling)
    return text if hit is None else text[: hit[sampling.include_stop_str_in_output]]


class StopTexts:
    """Makes watches for the sequences of one model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ends: dict[tuple[str, ...], _Ends] = {}

    def watch(self, sampling: SamplingParams, token_ids: Iterable[int] = ()) -> StopWatch:
        """A watch for `sampling`, which has stop texts, that begins after `token_ids` of an output, which hold none."""
        if sampling.stop not in self._ends:
            if len(self._ends) >= _KEPT:
                self._ends.clear()
            self._ends[sampling.stop] = _Ends(self._tokenizer, sampling.stop, only_appends=self._only_appends)
        return StopWatch(self._tokenizer, sampling, self._ends[sampling.stop], token_ids)


    @functools.cached_property
    def _only_appends(self) -> bool:
        return self._tokenizer.only_appends


class _Ends(dict[int, bool]):
    """Token id -> whether it may be the one that completes a stop text: whether it has the last character of one.

    Most tokens have not, and cost no more than this look-up. Of a token whose text is not plain from itself it is supposed: of a part of
    a character, and of a space, which some decoders add and others leave out.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], *, only_appends: bool) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._last = {stop[-1] for stop in stops} | {_BROKEN}
        self._all = " " in self._last or not only_appends

    def __missing__(self, token: int) -> bool:
        self[token] = self._all or not self._last.isdisjoint(self._tokenizer.decode([token]))
        return self[token]


class StopWatch:
    """Reads the text of one sequence as its tokens come. Made by `StopTexts.watch`."""

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams, ends: _Ends, token_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._ends = ends
        self._ids = list(token_ids)
        self._tail_length = max(map(len, sampling.stop)) - 1
        self._tail = ""
        """The end of the text that has been read: what a stop text may have begun in."""
        self._num_read = 0
        """Tokens whose text is read: no token to come changes it."""
        self._start = 0
        """The first one of the window of tokens that are decoded together ..."""
        self._read = ""
        """... and the text of those in it that are read."""
        self._num_broken = 0
        """How often in a row the text that was looked at ended in the middle of a character."""
        num_read, text = _whole(tokenizer, self._ids)
        self._go_on(num_read, text, text)

    def add(self, token: int) -> bool:
        """Take in the next token of the output; whether a stop text is complete with it."""
        self._ids.append(token)
        # A clean-up changes the text across any window.
        if not self._tokenizer.cleans_up and not (self._ends[token] and self._look()):
            return False
        return stop_in(self._tokenizer, self._ids, self._sampling)[1] is not None

    def _look(self) -> bool:
        """Whether a stop text seems to end in the text that is not read yet: in that of the last token."""
        window = self._tokenizer.decode(self._ids[self._start :])
        text = self._tail + window[len(self._read) :]
        found = len(self._ids) > self._sampling.min_tokens and find_stop(text, self._sampling.stop, len(self._tail)) is not None
        is_broken = window.endswith(_BROKEN)
        self._num_broken = (self._num_broken + 1) * is_broken
        if not is_broken or self._num_broken >= _WINDOW:
            self._go_on(len(self._ids), window, text)
        return found

    def _go_on(self, num_read: int, window: str, text: str) -> None:
        """So many tokens are read; `window` is the text of those in the window, which becomes a short one, `text` ends as all text."""
        self._tail = text[max(0, len(text) - self._tail_length) :]
        self._num_read, self._read, self._num_broken = num_read, window, 0
        if num_read - self._start <= _WINDOW:
            return
        for context in range(_CONTEXT, _WINDOW):
            self._start = num_read - context
            self._read = self._tokenizer.decode(self._ids[self._start : num_read])
            # Further back where these tokens have no text, or begin inside a character.
            if self._read and not self._read.startswith(_BROKEN):
                return
