"""A request on its way in, a generation on its way out: the plain data that every floor understands."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hpcinfer.errors import ConfigError


NOT_A_TOKEN = -1
"""Drawn where a model's logits are not numbers; the row fails and the others go on."""
NO_TOKEN_LEFT = -2
"""Drawn where every token is ruled out, by bad words and the like; the row fails and the others go on."""
END_WITHOUT_TOKEN = -3
"""Drawn where a structure is complete and no end of sequence may follow it; the row ends."""


class Constraint(NamedTuple):
    """What the text of a row has to be."""

    kind: str
    """One of CONSTRAINT_KINDS."""
    text: str
    """A JSON schema, a regular expression, a JSON list of texts, or a grammar."""


CONSTRAINT_KINDS = ("json", "regex", "choice", "grammar")
STRUCTURED_FIELDS = tuple(f"structured_{kind}" for kind in CONSTRAINT_KINDS)
"""Their fields in SamplingParams; at most one is given."""

MOST_LOGPROBS = 1000
"""Most likely tokens whose log-probabilities may be asked for at each place."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are chosen. The `[sampling]` section of a job; a row of the prompts may override any field."""

    max_tokens: int = 128
    """Most tokens to generate for a row, the stop token included. Default 128."""
    temperature: float = 0.0
    """0 takes the most likely token (greedy); 1 draws from the model's own distribution. Default 0."""
    top_k: int = 0
    """Draw only from the k most likely tokens; 0 switches it off. Default 0."""
    top_p: float = 1.0
    """Draw only from the smallest set of tokens whose probability reaches top_p (Holtzman et al. 2020). Default 1 (off)."""
    min_p: float = 0.0
    """Draw only from tokens at least min_p times as likely as the best one (Nguyen et al. 2024). Default 0 (off)."""
    n: int = 1
    """Samples for each row. With n > 1 each (row, sample) is an output row of its own. Default 1."""
    seed: int = 0
    """Draws depend on (seed, row, sample, position) alone, never on the batch or the layout. Default 0."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a generation, beside the model's own end-of-sequence ids. The id stays in token_ids."""
    ignore_eos: bool = False
    """Go on to max_tokens whatever the model says. For benchmarks. Default false."""
    stop: tuple[str, ...] = ()
    """Texts that end a generation; the one that is complete first counts. Text is cut before it, token_ids are kept up to the token
    that completed it. Needs a tokenizer. Default none."""
    include_stop_str_in_output: bool = False
    """Cut text after the stop text and not before it. Default false."""
    min_tokens: int = 0
    """No end-of-sequence or stop token is drawn before so many tokens, and no stop text counts that is complete before. Default 0."""
    repetition_penalty: float = 1.0
    """Logits of tokens that are in the prompt or the output are divided by it where they are positive, else multiplied with it
    (Keskar et al. 2019). Default 1 (off)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that are in the output, from -2 to 2. Default 0 (off)."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens once for each time that they are in the output, from -2 to 2. Default 0 (off)."""
    logit_bias: dict[int, float] = dataclasses.field(default_factory=dict, hash=False)
    """Token id -> what is added to its logit; minus infinity rules it out. Default none."""
    bad_words: tuple[str, ...] = ()
    """Texts that are not generated, at the start of a word as well as inside one: the token that would complete one is ruled out.
    Needs a tokenizer. Default none."""
    structured_json: str = ""
    """The text is JSON that fulfils this JSON schema (the text of an object). Needs a tokenizer and llguidance, as the other three; a
    row has at most one of them, and its own replaces the job's. max_tokens may cut a structure short. Default "": free text."""
    structured_regex: str = ""
    """The whole text matches this regular expression, of Rust's regex: no look-around, no back-references. Default "": free text."""
    structured_choice: tuple[str, ...] = ()
    """The text is one of these. Default none: free text."""
    structured_grammar: str = ""
    """The text is in the language of this context-free grammar, written for Lark or for llama.cpp (GBNF). Default "": free text."""
    logprobs: int | None = None
    """Keep the log-probability of each generated token, and those of so many of the most likely tokens in its place; 0 keeps that of the
    token alone. They are the model's own: before temperature, penalties and filters. Default: none are kept."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt, each given those before it. Default: none are kept."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_token_ids", tuple(int(i) for i in self.stop_token_ids or ()))
        object.__setattr__(self, "stop", _texts(self.stop))
        object.__setattr__(self, "bad_words", _texts(self.bad_words))
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        object.__setattr__(self, "structured_json", _schema_text(self.structured_json))
        object.__setattr__(self, "structured_choice", _texts(self.structured_choice))
        for name in ("structured_regex", "structured_grammar"):
            object.__setattr__(self, name, "" if getattr(self, name) is None else getattr(self, name))
        given = tuple(name for name in STRUCTURED_FIELDS if getattr(self, name))
        rules = (
            (1 <= self.max_tokens < 2**31, "max_tokens", self.max_tokens, "at least 1, below 2**31"),
            (0.0 <= self.temperature < float("inf"), "temperature", self.temperature, "0 or more"),
            (0 <= self.top_k < 2**31, "top_k", self.top_k, "0 (off) or more, below 2**31"),
            (0.0 < self.top_p <= 1.0, "top_p", self.top_p, "above 0 and at most 1"),
            (0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "from 0 to 1"),
            (1 <= self.n <= 65535, "n", self.n, "from 1 to 65535"),
            (0 <= self.seed < 2**63, "seed", self.seed, "from 0 to 2**63 - 1"),
            (all(0 <= i < 2**31 for i in self.stop_token_ids), "stop_token_ids", self.stop_token_ids, "token ids of 0 or more, below 2**31"),
            (all(type(i) is str and i for i in self.stop), "stop", self.stop, "texts that are not empty"),
            (0 <= self.min_tokens < 2**31, "min_tokens", self.min_tokens, "0 or more, below 2**31"),
            (1e-30 <= self.repetition_penalty <= 1e30, "repetition_penalty", self.repetition_penalty, "above 0, from 1e-30 to 1e30"),
            (-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", self.presence_penalty, "from -2 to 2"),
            (-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", self.frequency_penalty, "from -2 to 2"),
            (all(type(i) is str and i.strip() for i in self.bad_words), "bad_words", self.bad_words, "texts that are not blank"),
            (all(type(i) is str for i in self.structured_choice), "structured_choice", self.structured_choice, "texts"),
            (type(self.structured_json) is str, "structured_json", self.structured_json, "a text"),
            (type(self.structured_regex) is str, "structured_regex", self.structured_regex, "a text"),
            (type(self.structured_grammar) is str, "structured_grammar", self.structured_grammar, "a text"),
            (len(given) <= 1, given[0] if given else "", f"... beside {', '.join(given[1:])}", "the only structure"),
            (_is_count(self.logprobs), "logprobs", self.logprobs, f"from 0 to {MOST_LOGPROBS}"),
            (_is_count(self.prompt_logprobs), "prompt_logprobs", self.prompt_logprobs, f"from 0 to {MOST_LOGPROBS}"),
        )
        for holds, name, value, allowed in rules:
            if not holds:
                raise ConfigError(f"sampling.{name} = {value}"[:300], fix=f"{name} must be {allowed}")

    @property
    def counts_tokens(self) -> bool:
        """Whether a draw depends on which tokens there are before it, and how often."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def is_structured(self) -> bool:
        """Whether the text has a constraint."""
        return any(getattr(self, name) for name in STRUCTURED_FIELDS)

    @property
    def constraint(self) -> Constraint | None:
        """What the text has to be; None leaves it free."""
        for kind, name in zip(CONSTRAINT_KINDS, STRUCTURED_FIELDS, strict=True):
            if value := getattr(self, name):
                return Constraint(kind, value if isinstance(value, str) else json.dumps(value))
        return None


def _is_count(value: int | None) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_LOGPROBS)


def _texts(value: Any) -> tuple[str, ...]:
    """One text, several or None, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value or ())


def _schema_text(value: Any) -> Any:
    """The compact text of a JSON schema that may have come as an object; what is neither stays."""
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")) if isinstance(value, Mapping | bool) else value


def _bias(value: Any) -> dict[int, float]:
    """Token id -> bias, in the order of ids. JSON and TOML have texts as keys. Raises ConfigError."""
    if value is None:
        return {}
    try:
        bias = {_token_id(key): float(each) for key, each in value.items()} if isinstance(value, Mapping) else None
    except (TypeError, ValueError, OverflowError):
        bias = None
    # float32 is what they are added to: larger numbers would make infinity of it.
    if bias is None or not all(abs(each) < 1e38 or each == -math.inf for each in bias.values()):
        raise ConfigError(
            f"sampling.logit_bias = {value}"[:200], fix="logit_bias must be token ids of 0 or more with numbers, as {50256: -100.0}"
        )
    return dict(sorted(bias.items()))


def _token_id(key: Any) -> int:
    number = int(key) if isinstance(key, str | np.integer) else key
    if type(number) is not int or not 0 <= number < 2**31:
        raise ValueError(key)
    return number


TASKS = ("generate", "score", "embed")
POOLINGS = ("last", "mean", "cls")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TaskParams:
    """What is done with each row: the `[task]` section of a job. Where only the kind is to be said, `task = "score"` will do."""

    kind: str = "generate"
    """generate; score: the log-probability and the perplexity of texts; embed: pooled hidden states. The last two draw no tokens: of
    `[sampling]` they read nothing, but score heeds prompt_logprobs, and keeps those of single tokens. Default generate."""
    continuation: str = ""
    """Score: the meta column of the prompts (`/meta/NAME`) whose texts, or token ids, are scored, each given its prompt. Default "": the
    prompt itself is, each token given those before it."""
    pooling: str = "last"
    """Embed: which hidden states after the last norm are averaged: those of all tokens of the prompt (mean), its last one (last) or its
    first one (cls). Default last."""
    normalize: bool = True
    """Embed: divide by the Euclidean length. Default true."""

    def __post_init__(self) -> None:
        if self.kind not in TASKS:
            raise ConfigError(f"task.kind = {self.kind!r}", fix=f"give one of {', '.join(TASKS)}")
        if self.pooling not in POOLINGS:
            raise ConfigError(f"task.pooling = {self.pooling!r}", fix=f"give one of {', '.join(POOLINGS)}")
        if self.continuation and self.kind != "score":
            raise ConfigError(f"task.continuation with task.kind = {self.kind!r}", fix='set task.kind = "score", or leave it out')

    @classmethod
    def from_text(cls, kind: str) -> TaskParams:
        """Of one kind, all else as by default."""
        return cls(kind=kind)

    @property
    def generates(self) -> bool:
        """Whether it is tokens that rows get."""
        return self.kind == "generate"


class Status(enum.IntEnum):
    """What became of an output row. The values are stored; the order of preference is ok, failed, partial."""

    OK = 0
    FAILED = 1
    PARTIAL = 2


class FinishReason(enum.IntEnum):
    """Why a generation ended. The values are stored."""

    NONE = 0
    """Not ended (a partial row), never begun (a failed row), or nothing to generate (scored and embedded rows)."""
    STOP = 1
    """A stop token: one of the model's end-of-sequence ids or of `stop_token_ids`; or a text of `stop`; or a structure is complete."""
    LENGTH = 2
    """`max_tokens`, or the model's context, was reached."""


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class TokenLogprobs:
    """Natural logarithms of the probabilities of T consecutive tokens, and at each place of the k most likely ones.

    They are those of the model's own distribution: before temperature, penalties and filters.
    """

    chosen: np.ndarray
    """float32 [T]: of the tokens themselves; NaN where there is none (the first token of a prompt)."""
    top_ids: np.ndarray
    """int32 [T, k]: the most likely tokens, the best one first; of equal ones the lowest id. -1 where there are none."""
    top: np.ndarray
    """float32 [T, k]: their log-probabilities."""

    @classmethod
    def empty(cls, num_tokens: int, num_top: int) -> TokenLogprobs:
        """Of `num_tokens` places of which nothing is known."""
        return cls(
            np.full(num_tokens, np.nan, np.float32), np.full((num_tokens, num_top), -1, np.int32),
            np.full((num_tokens, num_top), np.nan, np.float32),
        )

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, places: slice) -> TokenLogprobs:
        return TokenLogprobs(self.chosen[places], self.top_ids[places], self.top[places])

    def followed_by(self, other: TokenLogprobs) -> TokenLogprobs:
        """These, then those of `other`, which has as many most likely ones."""
        parts = ((self.chosen, other.chosen), (self.top_ids, other.top_ids), (self.top, other.top))
        return TokenLogprobs(*map(np.concatenate, parts))


@dataclasses.dataclass(frozen=True, slots=True)
class TextScore:
    """How likely a model finds a text."""

    logprob: float
    """The sum of the log-probabilities of the scored tokens, natural logarithm."""
    num_tokens: int
    """Scored tokens, at least one."""

    @property
    def perplexity(self) -> float:
        """exp(-logprob / num_tokens); infinite where that is more than a float holds."""
        try:
            return math.exp(-self.logprob / self.num_tokens)
        except OverflowError:
            return math.inf


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One sequence to generate: a row of the prompts and one of its samples."""

    row: int
    """Row number in the prompts; with `sample` the key of everything that comes of it."""
    sample: int = 0
    prompt_token_ids: np.ndarray
    """int32 [num_prompt_tokens], at least one."""
    sampling: SamplingParams
    output_token_ids: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.int32))
    """int32: tokens that an earlier life generated (a partial row); they count towards max_tokens."""
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    """Token ids of `sampling.bad_words`: of each sequence the last id is ruled out after the others."""
    output_logprobs: TokenLogprobs | None = None
    """Of output_token_ids, where `sampling.logprobs` asks for them."""
    prompt_logprobs: TokenLogprobs | None = None
    """What an earlier life has found; None where `sampling.prompt_logprobs` asks for them and they are to be found."""
    task: TaskParams = TaskParams()
    """With a task that generates nothing a single token is drawn, by which the row ends, and dropped."""
    score_from: int = 1
    """Score: place of the first token of the prompt that counts, 1 or more."""

    @property
    def key(self) -> tuple[int, int]:
        """(row, sample)."""
        return (self.row, self.sample)

    @property
    def edits_logits(self) -> bool:
        """Whether something changes the logits before temperature and filters."""
        sampling = self.sampling
        return sampling.counts_tokens or bool(sampling.logit_bias or sampling.min_tokens or self.bad_words_token_ids)

    @property
    def first_scored(self) -> int | None:
        """Place of the first token of the prompt whose log-probability is to be found; None where none is."""
        if self.sampling.prompt_logprobs is not None:
            return 1 if self.prompt_logprobs is None else None
        return self.score_from if self.task.kind == "score" else None

    @property
    def pooled(self) -> tuple[int, int] | None:
        """First and one past the last of the prompt's tokens whose hidden states are averaged; None where none are."""
        if self.task.kind != "embed":
            return None
        num_tokens = len(self.prompt_token_ids)
        return {"mean": (0, num_tokens), "last": (num_tokens - 1, num_tokens), "cls": (0, 1)}[self.task.pooling]

    @property
    def needs_history(self) -> bool:
        """Whether a draw depends on the tokens before it by more than the model: it is then not computed ahead of them."""
        sampling = self.sampling
        return sampling.counts_tokens or sampling.is_structured or any(len(ids) > 1 for ids in self.bad_words_token_ids)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """One output row: what came of a (row, sample)."""

    row: int
    sample: int = 0
    status: Status
    finish_reason: FinishReason = FinishReason.NONE
    token_ids: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.int32))
    """int32 [num_output_tokens], the stop token included."""
    text: str = ""
    """The detokenised token_ids, special tokens left out, cut at a stop text; empty where there is no tokenizer."""
    num_prompt_tokens: int = 0
    error: str = ""
    """For failed rows: what is wrong with the row, in words."""
    logprobs: TokenLogprobs | None = None
    """Of the token_ids, where the row asked for them."""
    prompt_logprobs: TokenLogprobs | None = None
    """Of the prompt's tokens, each given those before it, where the row asked for them; of the first there is none."""
    score: TextScore | None = None
    """Of a row that was scored."""
    embedding: np.ndarray | None = None
    """float32 [D], of a row that was embedded."""

    @property
    def key(self) -> tuple[int, int]:
        """(row, sample)."""
        return (self.row, self.sample)
