"""From a prompt and its sampling to a request, with all that can be found wrong before it runs."""

from __future__ import annotations

import numpy as np

from hpcinfer.data.tokenize import Tokenizer
from hpcinfer.errors import RowError
from hpcinfer.request import Generation, Request, SamplingParams, Status, TaskParams, TokenLogprobs
from hpcinfer.sampling.grammar import Grammars

_KEPT = 256
"""Lists of bad words whose token ids are kept: most rows have the job's."""


class RequestBuilder:
    """Makes the requests of one model.

    Args:
        tokenizer: None where the model has none; what needs text is then refused.
        vocab_size: token ids must be below it.
        grammars: what checks constraints, where it is shared with those that generate under them.
        task: what is done with each row.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, vocab_size: int, grammars: Grammars | None = None, *, task: TaskParams = TaskParams()
    ) -> None:
        self._task = task
        self._tokenizer = tokenizer
        self._grammars = grammars or Grammars(lambda: tokenizer, vocab_size=vocab_size, eos_token_ids=())
        self._vocab_size = vocab_size
        self._bad_words: dict[tuple[str, ...], tuple[tuple[int, ...], ...]] = {}

    def build(
        self,
        *,
        row: int,
        sample: int = 0,
        prompt_token_ids: np.ndarray,
        sampling: SamplingParams,
        score_from: int = 1,
        earlier: Generation | None = None,
    ) -> Request:
        """The request.

        Args:
            score_from: place of the first token that is scored.
            earlier: a partial row of an earlier life. One that lacks something begins anew: it draws the same tokens.

        Raises:
            RowError: a token id outside the vocabulary, sampling that this model cannot do, or nothing to score.
            ConfigError: structured output without llguidance.
        """
        if len(prompt_token_ids) and int(prompt_token_ids.max()) >= self._vocab_size:
            raise RowError(f"token id {int(prompt_token_ids.max())} is not in the model's vocabulary of {self._vocab_size}")
        if self._task.kind == "score" and score_from >= len(prompt_token_ids):
            raise RowError(f"nothing to score: of {len(prompt_token_ids)} tokens the first has nothing before it")
        if not self._task.generates:
            prompt_logprobs = sampling.prompt_logprobs if self._task.kind == "score" else None
            sampling = SamplingParams(max_tokens=1, prompt_logprobs=prompt_logprobs)
        self.check(sampling)
        if earlier is None or not _is_whole(earlier, len(prompt_token_ids), sampling):
            earlier = Generation(row=row, sample=sample, status=Status.PARTIAL)
        return Request(
            row=row,
            sample=sample,
            prompt_token_ids=prompt_token_ids,
            sampling=sampling,
            output_token_ids=earlier.token_ids,
            output_logprobs=earlier.logprobs,
            prompt_logprobs=earlier.prompt_logprobs,
            bad_words_token_ids=self._token_ids_of(sampling.bad_words) if sampling.bad_words else (),
            task=self._task,
            score_from=score_from,
        )

    def check(self, sampling: SamplingParams) -> None:
        """Raise RowError where a request with this sampling could not be run, ConfigError where a library for it is missing."""
        if sampling.min_tokens > sampling.max_tokens:
            raise RowError(f"min_tokens = {sampling.min_tokens} is more than max_tokens = {sampling.max_tokens}")
        highest = max(sampling.logit_bias, default=0)
        if highest >= self._vocab_size:
            raise RowError(f"logit_bias for token id {highest}, which is not in the model's vocabulary of {self._vocab_size}")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(sampling, name) or 0) > self._vocab_size:
                raise RowError(f"{name} = {getattr(sampling, name)} is more than the model's vocabulary of {self._vocab_size}")
        if self._tokenizer is None and (sampling.stop or sampling.bad_words):
            raise RowError(f"{'stop' if sampling.stop else 'bad_words'} needs text, and the model folder has no tokenizer.json")
        if sampling.bad_words:
            self._token_ids_of(sampling.bad_words)
        if sampling.is_structured:
            self._grammars.check(sampling.constraint)

    def _token_ids_of(self, bad_words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """The token ids of each word, as it is inside a word and as it is at the start of one."""
        known = self._bad_words.get(bad_words)
        if known is None:
            if len(self._bad_words) >= _KEPT:
                self._bad_words.clear()
            known = self._bad_words[bad_words] = tuple(dict.fromkeys(ids for word in bad_words for ids in self._forms(word)))
        return known

    def _forms(self, word: str) -> list[tuple[int, ...]]:
        forms = [tuple(self._tokenizer.encode_plain(start + word.lstrip()).tolist()) for start in ("", " ")]
        if not all(forms):
            raise RowError(f"the bad word {word!r} has no tokens")
        return forms


def _is_whole(partial: Generation, num_prompt_tokens: int, sampling: SamplingParams) -> bool:
    """Whether a partial row has all that is to be kept of it."""
    return _has(partial.logprobs, len(partial.token_ids), sampling.logprobs) and _has(
        partial.prompt_logprobs, num_prompt_tokens, sampling.prompt_logprobs
    )


def _has(logprobs: TokenLogprobs | None, num_tokens: int, num_top: int | None) -> bool:
    return num_top is None or (logprobs is not None and logprobs.top.shape == (num_tokens, num_top))
