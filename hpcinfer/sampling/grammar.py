"""Constraints on the text of a row, compiled by llguidance for a model's vocabulary: JSON schema, regular expression, choice, grammar.

llguidance (https://github.com/guidance-ai/llguidance) reads the tokens' bytes out of tokenizer.json and answers, for what was
generated so far, which tokens may come next. What it does not know of a schema (`not`, `uniqueItems`, ...) it refuses.

Shape letters: V vocabulary, W = ceil(V / 32) words of a mask.
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import os
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np

from hpcinfer.data.tokenize import Tokenizer
from hpcinfer.errors import ConfigError, HpcinferError, RowError
from hpcinfer.request import END_WITHOUT_TOKEN, NO_TOKEN_LEFT, Constraint

T = TypeVar("T")

_MOST_COMPILED = 1024
"""Constraints kept compiled: rows may bring as many as there are rows."""
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,20}"
"""Between the parts of JSON, where the schema does not say itself (`x-guidance`): room for any usual layout, and no more, so that a
model that likes blanks must go on."""
_LONGEST = {"regex": 1 << 15, "json": 1 << 20, "grammar": 1 << 20}
"""Characters of a constraint; what is longer may take minutes to compile."""
_STACK_BYTES = 512 << 20
"""Of the threads that compile: llguidance calls itself once for each level of a constraint, and ends the process at the stack's end. Only
what is touched is memory."""
_REASON_CHARACTERS = 300
_MOST_THREADS = 8


class _Library(NamedTuple):
    """llguidance with a model's tokenizer."""

    module: Any
    tokenizer: Any
    executor: Any
    """Fills several masks at once."""
    ends: _Bits
    """The tokens that it lets through where a text may end."""


class Grammars:
    """The compiled constraints of one model. A thread that compiles keeps none waiting that fills masks.

    The tokenizer and llguidance are loaded when the first constraint comes.

    Args:
        tokenizer: gives the model's, or None where it has none.
        vocab_size: V, that of the logits; it may be larger or smaller than the tokenizer's.
        eos_token_ids: the model's own end-of-sequence ids; may be empty.
    """

    def __init__(
        self, tokenizer: Callable[[], Tokenizer | None], *, vocab_size: int, eos_token_ids: Collection[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = np.array(sorted(i for i in eos_token_ids if i < vocab_size), np.int64)
        self._ends = _Bits(self._eos_token_ids)
        self._compiled = functools.lru_cache(_MOST_COMPILED)(lambda constraint: _with_deep_stack(lambda: self._compile(constraint)))
        self._loading = threading.Lock()

    def check(self, constraint: Constraint) -> None:
        """Make sure that rows can be generated under `constraint`.

        Raises:
            RowError: it cannot be compiled, with llguidance's reason; nothing fulfils it; or this model's tokenizer cannot be used.
            ConfigError: llguidance is not installed.
        """
        self._usable(constraint)

    def matcher(self, constraint: Constraint, *, may_end: bool) -> Matcher:
        """A matcher at the start of the constraint.

        Args:
            may_end: the model's end-of-sequence ids end the row.

        Raises:
            RowError, ConfigError: as `check`.
        """
        return Matcher(self._usable(constraint), may_end=may_end and len(self._eos_token_ids) > 0)

    @property
    def mask_words(self) -> int:
        """Words of 32 tokens in a mask: W, or what the tokenizer needs where it has more tokens."""
        return -(-self._library.tokenizer.vocab_size // 32)

    def fill(self, matchers: list[Matcher], words: np.ndarray) -> list[int | None]:
        """The tokens that may come next, of R matchers.

        Args:
            words: int32 [R, `mask_words`], contiguous; bit i % 32 of word i // 32 becomes 1 where token i is allowed.

        Returns:
            For each None where its mask has a token; else what to return in place of one (END_WITHOUT_TOKEN, NO_TOKEN_LEFT).
        """
        library = self._library
        self._compute(matchers, words)
        for row, matcher in enumerate(matchers):
            if matcher.library.is_error():
                self._compute_anew(matcher, words[row : row + 1])
        ends = library.ends.any(words)
        library.ends.clear(words)
        goes_on = self._any_token(words)
        instead = [
            matcher.without_ends(goes_on=more, ends=end)
            for matcher, more, end in zip(matchers, goes_on.tolist(), ends.tolist(), strict=True)
        ]
        may_end = [matcher.may_end and value is None for matcher, value in zip(matchers, instead, strict=True)]
        self._ends.set(words, np.flatnonzero(ends & may_end))
        return instead

    def _compute(self, matchers: list[Matcher], words: np.ndarray) -> None:
        """The library's own masks."""
        self._library.executor.unsafe_compute_mask_ptr(
            [(matcher.library, row) for row, matcher in enumerate(matchers)], words.ctypes.data, words.shape[1] * 4, len(words)
        )

    def _compute_anew(self, matcher: Matcher, words: np.ndarray) -> None:
        """`_compute` for one whose library's matcher has failed: perhaps by what others have put into the automaton that they share. What
        an automaton of its own says is the answer.
        """
        for original in matcher.compiled.others(matcher.original):
            matcher.begin(original)
            self._compute([matcher], words)
            if not matcher.library.is_error():
                matcher.compiled.original = original
                return

    def _any_token(self, words: np.ndarray) -> np.ndarray:
        """bool [R]: whether a token of the model's vocabulary is allowed."""
        whole, rest = divmod(self._vocab_size, 32)
        found = words[:, :whole].any(axis=1)
        return found | ((words[:, whole] & np.int32((1 << rest) - 1)) != 0) if rest else found

    @property
    def _library(self) -> _Library:
        with self._loading:  # by whichever thread comes first
            return self._loaded

    @functools.cached_property
    def _loaded(self) -> _Library:
        module = _llguidance()
        tokenizer = self._tokenizer()
        if tokenizer is None:
            raise RowError("structured output needs the text of tokens, and the model folder has no tokenizer.json")
        own = tokenizer.largest_id + 1
        # It refuses ends that the tokenizer does not have; without any it takes what the file names as the end.
        ends = [i for i in self._eos_token_ids.tolist() if i < own]
        try:
            view = module.LLTokenizer(tokenizer.to_json(), n_vocab=max(own, self._vocab_size), eos_token=ends or None)
        except ValueError as error:
            raise RowError(f"structured output does not work with this model's tokenizer: {_one_line(str(error))}") from error
        threads = max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) - 1))
        return _Library(module, view, module.LLExecutor(threads), _Bits(np.array(view.eos_tokens, np.int64)))

    def _usable(self, constraint: Constraint) -> _Compiled:
        """A compiled constraint. Raises as `check`."""
        compiled = self._compiled(constraint)
        if isinstance(compiled, HpcinferError):
            raise compiled.with_traceback(None)
        return compiled

    def _compile(self, constraint: Constraint) -> _Compiled | HpcinferError:
        """The compiled constraint, or why there is none: what is returned is kept, what is raised is not."""
        longest = _LONGEST.get(constraint.kind)
        if longest is not None and len(constraint.text) > longest:
            return _refused(constraint, f"it has {len(constraint.text)} characters; at most {longest} are compiled")
        try:
            library = self._library
            grammar = _FORMS[constraint.kind](library.module, constraint.text)
        except (ConfigError, RowError) as error:
            return error
        except (ValueError, RecursionError) as error:
            return _refused(constraint, str(error))
        limits = library.module.LLParserLimits(verbose_errors=False)
        compiled = _Compiled(lambda: library.module.LLMatcher(library.tokenizer, grammar, log_level=0, limits=limits))
        if compiled.original.is_error():
            return _refused(constraint, compiled.original.get_error())
        first = Matcher(compiled, may_end=True)
        words = np.empty((1, self.mask_words), np.int32)
        if self.fill([first], words) == [NO_TOKEN_LEFT]:
            reason = f"no text of this model does ({first.error or 'no token'})"
            return RowError(f"structured_{constraint.kind} cannot be fulfilled: {reason}")
        second = Matcher(compiled, may_end=True)
        self._compute([second], words)
        if second.error:  # its first step alone takes all that an automaton may have
            return _refused(constraint, second.error)
        return compiled


class _Compiled:
    """A constraint as the library has compiled it.

    The library's matchers share an automaton with those that they are copied from. It grows with the texts that they go through, and
    is of no use any more once it has reached the library's limit.

    Args:
        make: the library's matcher at the start of the constraint, with an automaton of its own.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self.original = make()
        """What is copied for new sequences; nobody goes on with it."""

    def others(self, failed: Any) -> Iterator[Any]:
        """What may be copied in place of an original that has failed; the last one is new."""
        if self.original is not failed:
            yield self.original
        yield _with_deep_stack(self._make)


class Matcher:
    """One sequence's place in its constraint.

    Args:
        compiled: the constraint.
        may_end: the model's end-of-sequence ids end the row.
    """

    def __init__(self, compiled: _Compiled, *, may_end: bool) -> None:
        self.compiled = compiled
        self.may_end = may_end
        self._token_ids: list[int] = []
        self.begin(compiled.original)

    def begin(self, original: Any) -> None:
        """Go to the same place with a copy of `original`."""
        self.original = original
        self.library = original.deep_copy()
        if self._token_ids:
            self.library.consume_tokens(self._token_ids)

    @property
    def error(self) -> str:
        """Why it does not go on, in the library's words; "" where it does."""
        return _one_line(self.library.get_error()) if self.library.is_error() else ""

    def consume(self, token_ids: list[int]) -> None:
        """Go on by what was generated. A token that is not allowed here is an error that stays."""
        self._token_ids += token_ids
        self.library.consume_tokens(token_ids)

    def without_ends(self, *, goes_on: bool, ends: bool) -> int | None:
        """What to return in place of a token where only an end is left, or None.

        Args:
            goes_on: tokens other than ends are allowed.
            ends: the library lets an end through.
        """
        if self.library.is_error():
            return NO_TOKEN_LEFT
        if goes_on:
            return None
        # The library lets an end through also where nothing else is left and the text is not complete.
        if not ends or not self.library.is_accepting():
            return NO_TOKEN_LEFT
        return None if self.may_end else END_WITHOUT_TOKEN


class _Bits:
    """Some tokens in a mask."""

    def __init__(self, token_ids: np.ndarray) -> None:
        self._words, inverse = np.unique(token_ids // 32, return_inverse=True)
        bits = np.zeros(len(self._words), np.uint32)
        np.bitwise_or.at(bits, inverse, np.left_shift(np.uint32(1), (token_ids % 32).astype(np.uint32)))
        self._bits = bits.view(np.int32)

    def any(self, words: np.ndarray) -> np.ndarray:
        """bool [R]: whether any of them is in the masks int32 [R, W]."""
        return (words[:, self._words] & self._bits).any(axis=1)

    def clear(self, words: np.ndarray) -> None:
        words[:, self._words] &= ~self._bits

    def set(self, words: np.ndarray, rows: np.ndarray) -> None:
        """Put them into the masks of `rows`, int64."""
        words[rows[:, None], self._words] |= self._bits


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ConfigError(
            "structured output needs llguidance, which is not installed", found=str(error), fix="pip install 'hpcinfer[structured]'"
        ) from error
    return llguidance


def _json(library: Any, text: str) -> str:
    own = not isinstance(schema := json.loads(text), dict) or "x-guidance" in schema
    return library.LLMatcher.grammar_from_json_schema(text, defaults=None if own else {"whitespace_pattern": _WHITESPACE})


def _regex(library: Any, text: str) -> str:
    if (len(text) - len(text.rstrip("\\"))) % 2:  # it would escape the delimiter that the library puts behind it
        raise ValueError("a backslash at the end escapes nothing")
    return library.LLMatcher.grammar_from_regex(text)


def _choice(library: Any, text: str) -> str:
    # Every character by its number: nothing is left to escape.
    literals = ("".join(f"\\x{{{ord(character):x}}}" for character in choice) for choice in json.loads(text))
    return library.LLMatcher.grammar_from_regex("|".join(f"({literal})" for literal in literals))


def _grammar(library: Any, text: str) -> str:
    return library.grammar_from("grammar", text)


_FORMS = {"json": _json, "regex": _regex, "choice": _choice, "grammar": _grammar}


_starting = threading.Lock()


def _with_deep_stack(work: Callable[[], T]) -> T:
    """What `work` returns or raises, done by a thread with a stack of `_STACK_BYTES`."""
    done: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    with _starting:  # the size is the process's
        before = threading.stack_size(_STACK_BYTES)
        try:
            threading.Thread(target=run, name="grammar", daemon=True).start()
        finally:
            threading.stack_size(before)
    return done.result()


def _refused(constraint: Constraint, reason: str) -> RowError:
    return RowError(f"structured_{constraint.kind} cannot be used: {_one_line(reason)}")


def _one_line(text: str) -> str:
    line = " ".join(text.replace("<non-verbose/>", "").split())
    return line if len(line) <= _REASON_CHARACTERS else line[: _REASON_CHARACTERS - 3] + "..."
