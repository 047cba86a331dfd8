"""Stop texts: found while tokens come, and cut off at the end.

Which text a generation has depends on its token ids alone: it is what the tokenizer makes of all of them, cut at the first stop
text. While tokens come only the last few of them are turned into text, so that a long generation costs as much a token as a short
one; what that finds is then looked for in the whole text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from hpcinfer.data.tokenize import Tokenizer
from hpcinfer.request import SamplingParams

_BROKEN = "\ufffd"
"""What decoders put in the place of bytes that are no character, or not yet."""
_CONTEXT = 4
"""Tokens decoded before the first new one: what a token means may depend on its neighbour, as a space at the start does."""
_WINDOW = 16
"""Tokens decoded at a time; of broken text no more is waited for either. A character has at most 4 bytes."""


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
    after = len(tokenizer.decode(token_ids[: sampling.min_tokens]).rstrip(_BROKEN)) if sampling.min_tokens else 0
    return text, find_stop(text, sampling.stop, after)


def final_text(tokenizer: Tokenizer, token_ids: Sequence[int] | np.ndarray, sampling: SamplingParams) -> str:
    """The text of an output that has ended, cut at its stop text."""
    text, hit = stop_in(tokenizer, token_ids, sampling)
    return text if hit is None else text[: hit[sampling.include_stop_str_in_output]]


class StopWatch:
    """Reads the text of one sequence as its tokens come.

    Args:
        sampling: with stop texts.
        token_ids: of the output so far; they hold no stop text.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams, token_ids: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._sampling = sampling
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
        self._catch_up()

    def add(self, token: int) -> bool:
        """Take in the next token of the output; whether a stop text is complete with it."""
        self._ids.append(token)
        return self._look() and stop_in(self._tokenizer, self._ids, self._sampling)[1] is not None

    def _look(self) -> bool:
        """Whether a stop text seems to end in what the last token added to the text."""
        end = len(self._ids)
        window = self._tokenizer.decode(self._ids[self._start :])
        text = self._tail + window[len(self._read) :]
        found = end > self._sampling.min_tokens and find_stop(text, self._sampling.stop, len(self._tail)) is not None
        if not window.endswith(_BROKEN) or end - self._num_read >= _WINDOW:
            self._tail = text[max(0, len(text) - self._tail_length) :]
            self._num_read, self._read = end, window
            if end - self._start > _WINDOW:
                self._begin_window()
        return found

    def _begin_window(self) -> None:
        """A window that begins a few tokens before those to come, further back where these have no text."""
        self._read, context = "", _CONTEXT
        while not self._read and context <= _WINDOW:
            self._start = max(0, self._num_read - context)
            self._read = self._tokenizer.decode(self._ids[self._start : self._num_read])
            context *= 2

    def _catch_up(self) -> None:
        """Read what is there already, up to the last token at which no character is broken."""
        num_tokens = len(self._ids)
        for end in range(num_tokens, max(0, num_tokens - _WINDOW), -1):
            text = self._tokenizer.decode(self._ids[:end])
            if not text.endswith(_BROKEN) or end == num_tokens - _WINDOW + 1:
                self._tail = text[max(0, len(text) - self._tail_length) :]
                self._num_read = end
                self._begin_window()
                return
