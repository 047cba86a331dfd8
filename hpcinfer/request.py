"""A request on its way in, a generation on its way out: the plain data that every floor understands."""

from __future__ import annotations

import dataclasses
import enum

import numpy as np

from hpcinfer.errors import ConfigError


NOT_A_TOKEN = -1
"""Drawn where a model's logits are not numbers; the row fails and the others go on."""


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_token_ids", tuple(int(i) for i in self.stop_token_ids))
        rules = (
            (1 <= self.max_tokens < 2**31, "max_tokens", self.max_tokens, "at least 1, below 2**31"),
            (0.0 <= self.temperature < float("inf"), "temperature", self.temperature, "0 or more"),
            (0 <= self.top_k < 2**31, "top_k", self.top_k, "0 (off) or more, below 2**31"),
            (0.0 < self.top_p <= 1.0, "top_p", self.top_p, "above 0 and at most 1"),
            (0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "from 0 to 1"),
            (1 <= self.n <= 65535, "n", self.n, "from 1 to 65535"),
            (0 <= self.seed < 2**63, "seed", self.seed, "from 0 to 2**63 - 1"),
            (all(i >= 0 for i in self.stop_token_ids), "stop_token_ids", self.stop_token_ids, "token ids of 0 or more"),
        )
        for holds, name, value, allowed in rules:
            if not holds:
                raise ConfigError(f"sampling.{name} = {value}", fix=f"{name} must be {allowed}")


class Status(enum.IntEnum):
    """What became of an output row. The values are stored; the order of preference is ok, failed, partial."""

    OK = 0
    FAILED = 1
    PARTIAL = 2


class FinishReason(enum.IntEnum):
    """Why a generation ended. The values are stored."""

    NONE = 0
    """Not ended (a partial row) or never begun (a failed row)."""
    STOP = 1
    """A stop token: one of the model's end-of-sequence ids or of `stop_token_ids`."""
    LENGTH = 2
    """`max_tokens`, or the model's context, was reached."""


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

    @property
    def key(self) -> tuple[int, int]:
        """(row, sample)."""
        return (self.row, self.sample)


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
    """The detokenised token_ids, special tokens left out; empty where there is no tokenizer."""
    num_prompt_tokens: int = 0
    error: str = ""
    """For failed rows: what is wrong with the row, in words."""

    @property
    def key(self) -> tuple[int, int]:
        """(row, sample)."""
        return (self.row, self.sample)
