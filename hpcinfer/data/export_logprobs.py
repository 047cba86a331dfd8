"""Log-probabilities in the two forms of OpenAI's API: those of chat completions, and those of completions."""

from __future__ import annotations

import math
from typing import Any

from hpcinfer.data.tokenize import Tokenizer
from hpcinfer.request import FinishReason, Generation

_LEAST = -9999.0
"""What OpenAI gives where a probability is zero; JSON has no infinity."""
_BROKEN = "\ufffd"


class LogprobWriter:
    """Token texts are what the tokenizer makes of each token alone; special tokens have none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def chat(self, generation: Generation) -> dict[str, Any]:
        """The `logprobs` of a choice of a chat completion: {"content": [...], "refusal": null}."""
        content = []
        for token, logprob, top in self._places(generation):
            ranked = [{**self._named(one), "logprob": value} for one, value in top]
            content.append({**self._named(token), "logprob": logprob, "top_logprobs": ranked})
        return {"content": content, "refusal": None}

    def completion(self, generation: Generation) -> dict[str, Any]:
        """The `logprobs` of a choice of a completion: lists with an entry a token."""
        places = list(self._places(generation))
        tokens = [self._text(token) for token, _, _ in places]
        offsets = [0]
        for text in tokens:
            offsets.append(offsets[-1] + len(text))
        return {
            "tokens": tokens,
            "token_logprobs": [logprob for _, logprob, _ in places],
            "top_logprobs": [{self._text(one): value for one, value in top} for _, _, top in places],
            "text_offset": offsets[:-1],
        }

    def _places(self, generation: Generation):
        """(token id, its log-probability, [(id, log-probability), ...] of the most likely ones) of each token of the text."""
        found = generation.logprobs
        tokens = generation.token_ids.tolist()
        if tokens and generation.finish_reason == FinishReason.STOP and not self._text(tokens[-1]):
            tokens.pop()  # the end of sequence is no part of the text
        for place, token in enumerate(tokens):
            top = zip(found.top_ids[place].tolist(), found.top[place].tolist(), strict=True)
            yield token, _finite(found.chosen[place]), [(one, _finite(value)) for one, value in top if one >= 0]

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode([token])
        return self._texts[token]

    def _named(self, token: int) -> dict[str, Any]:
        text = self._text(token)
        # A token may be a part of a character, of which only the tokenizer knows the bytes.
        return {"token": text, "bytes": None if _BROKEN in text else list(text.encode())}


def _finite(value: float) -> float:
    return float(value) if math.isfinite(value) else _LEAST
