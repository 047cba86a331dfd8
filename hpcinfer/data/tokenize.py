"""Text to token ids and back, by the tokenizers library from a model folder's tokenizer.json.

Special tokens around a prompt (a begin-of-sequence token and the like) are those of tokenizer.json's post-processor and
no others. `add_bos_token` in tokenizer_config.json has no say: transformers 5 drops it where there is a tokenizer.json
(tokenization_utils_base.py, `_from_pretrained`), and equality with its AutoTokenizer is what the tests ask for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpcinfer.data.tokenizer_config import read_tokenizer_config, token_text
from hpcinfer.errors import CheckpointError, RowError

_SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA_SPECIAL_KEYS = ("extra_special_tokens", "additional_special_tokens")

_TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")

_CLEAN_UP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
    (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip
"""What transformers' clean_up_tokenization replaces, in its order."""


class Tokenizer:
    """The tokenizer of a model folder.

    Args:
        model_path: a Hugging Face folder with tokenizer.json, and tokenizer_config.json if there is one.
    Raises:
        CheckpointError: no tokenizer.json, or one that the tokenizers library cannot load.
    """

    def __init__(self, model_path: str | os.PathLike) -> None:
        # Here and not above: verbs that need no tokenizer start without loading the library.
        import tokenizers

        path = Path(model_path) / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{model_path} has no tokenizer.json",
                fix="prompts must then be token ids (int32), and generations carry no text",
            )
        self.config = read_tokenizer_config(Path(model_path))
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(path.read_text("utf-8"))
        except Exception as error:  # the library raises bare Exception, nothing narrower
            raise CheckpointError(f"{path} cannot be loaded", found=str(error)) from error
        # Settings left in the file by whoever saved it would silently cut or pad prompts.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._mark_special_tokens()
        is_bpe = isinstance(self._tokenizer.model, tokenizers.models.BPE)
        self.cleans_up = bool(self.config.get("clean_up_tokenization_spaces", False)) and not is_bpe
        """Spaces before punctuation are taken out of the whole text, so that a token may change what is before it."""

    @property
    def only_appends(self) -> bool:
        """Whether a token's own characters are in the text whatever follows. Some decoders, as WordPiece's, clean spaces up."""
        decoder = json.loads(self._tokenizer.to_str()).get("decoder")
        return not self.cleans_up and not _types(decoder) & {"WordPiece", "CTC"}

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def largest_id(self) -> int:
        """The largest token id; ids may have gaps."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def to_json(self) -> str:
        """As tokenizer.json has it, with all special tokens marked, for libraries that read it themselves."""
        return self._tokenizer.to_str()

    def token_id(self, token: str) -> int | None:
        """The id of a token by its text, or None."""
        return self._tokenizer.token_to_id(token)

    def special_token_id(self, name: str) -> int | None:
        """The id of a named special token of tokenizer_config.json, such as "bos_token" or "eos_token"; or None."""
        content = token_text(self.config.get(name))
        return None if content is None else self.token_id(content)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of one prompt, int32. Raises RowError."""
        result = self.encode_batch([text])[0]
        if isinstance(result, RowError):
            raise result
        return result

    def encode_plain(self, text: str) -> np.ndarray:
        """Token ids of a piece of text, int32, without the special tokens that stand around a prompt. Raises RowError."""
        try:
            return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
        except Exception as error:  # see encode_batch
            raise RowError(f"the text {text[:80]!r} cannot be tokenised: {error}") from error

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray | RowError]:
        """Token ids of each text, int32, in order; a text that cannot be tokenised gives a RowError in its place.

        The library spreads the batch over the cores (RAYON_NUM_THREADS limits it) and releases the GIL.
        """
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts))
            return [np.array(encoding.ids, np.int32) for encoding in encodings]
        except Exception:  # the library raises bare Exception, and does not say which text it was
            return [self._encode_alone(text) for text in texts]

    def encode_continued(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[tuple[np.ndarray, int] | RowError]:
        """Of each prompt with its continuation, tokenised as one text: token ids, int32, and the place of the first token that has
        something of the continuation. A text that cannot be tokenised gives a RowError in its place.
        """
        found: list[tuple[np.ndarray, int] | RowError] = []
        for prompt, continuation in zip(prompts, continuations, strict=True):
            try:
                encoding = self._tokenizer.encode(prompt + continuation)
            except Exception as error:  # see encode_batch
                found.append(RowError(f"prompt and continuation cannot be tokenised: {error}"))
                continue
            behind = [place for place, (_, end) in enumerate(encoding.offsets) if end > len(prompt)]
            found.append((np.array(encoding.ids, np.int32), behind[0]) if behind else RowError("the continuation has no tokens"))
        return found

    def _encode_alone(self, text: str) -> np.ndarray | RowError:
        try:
            return np.array(self._tokenizer.encode(text).ids, np.int32)
        except Exception as error:  # see encode_batch
            return RowError(f"the prompt cannot be tokenised: {error}")

    def encode_rendered(self, texts: Sequence[str]) -> list[np.ndarray | RowError]:
        """As `encode_batch`, of texts that hold their special tokens already, as chat templates write them: none are added."""
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.array(encoding.ids, np.int32) for encoding in encodings]
        except Exception as error:  # see encode_batch
            if len(texts) == 1:
                return [RowError(f"the prompt cannot be tokenised: {error}")]
            return [one for text in texts for one in self.encode_rendered([text])]

    def decode(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """The text of some token ids, special tokens left out; ids that the tokenizer does not know are skipped."""
        return self.decode_batch([token_ids])[0]

    def decode_batch(self, rows: Sequence[Sequence[int] | np.ndarray]) -> list[str]:
        """The text of each row of token ids, as `decode`."""
        lists = [row.tolist() if isinstance(row, np.ndarray) else list(row) for row in rows]
        texts = self._tokenizer.decode_batch(lists, skip_special_tokens=True)
        return [_clean_up(text) for text in texts] if self.cleans_up else texts

    def _mark_special_tokens(self) -> None:
        """Makes the tokens that tokenizer_config.json names special, also where tokenizer.json forgot to."""
        import tokenizers

        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        wanted = []
        for content, entry in _special_entries(self.config).items():
            if content not in special:
                flags = {name: bool(entry.get(name, False)) for name in _TOKEN_FLAGS}
                wanted.append(tokenizers.AddedToken(content, special=True, **flags))
        if wanted:
            self._tokenizer.add_special_tokens(wanted)


def _types(decoder: Any) -> set[str]:
    """The types of a decoder of tokenizer.json, of all its parts where it is a sequence of several."""
    if not isinstance(decoder, dict):
        return set()
    return {str(decoder.get("type"))}.union(*(_types(part) for part in decoder.get("decoders") or ()))


def _special_entries(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Text of each special token that the config names -> its flags, in the order of the config's usual keys."""
    entries = [config.get(key) for key in _SPECIAL_KEYS]
    for key in _EXTRA_SPECIAL_KEYS:
        more = config.get(key)
        entries += more if isinstance(more, list) else list(more.values()) if isinstance(more, dict) else []
    named = ((token_text(entry), entry if isinstance(entry, dict) else {}) for entry in entries)
    return {content: flags for content, flags in named if content}


def _clean_up(text: str) -> str:
    for old, new in _CLEAN_UP:
        text = text.replace(old, new)
    return text
