"""Text prompts to token ids while converting, a batch at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from hpcinfer.data.convert.base import Record, Reject
from hpcinfer.data.tokenize import Tokenizer
from hpcinfer.errors import RowError

_BATCH = 256


def tokenised(items: Iterator[Record | Reject], tokenizer: Tokenizer) -> Iterator[Record | Reject]:
    """The same items in order, text as token ids; what cannot be tokenised becomes a Reject.

    Rendered prompts hold their special tokens; to others the tokenizer adds its own, as `run` does to text.
    """
    while batch := list(itertools.islice(items, _BATCH)):
        ids: dict[int, object] = {}
        for rendered in (False, True):
            places = [
                i for i, item in enumerate(batch)
                if isinstance(item, Record) and isinstance(item.prompt, str) and item.prompt and item.rendered == rendered
            ]  # fmt: skip
            texts = [batch[i].prompt for i in places]
            if texts:
                encode = tokenizer.encode_rendered if rendered else tokenizer.encode_batch
                ids.update(zip(places, encode(texts), strict=True))
        for i, item in enumerate(batch):
            found = ids.get(i)
            if isinstance(found, RowError):
                yield Reject(item.number, str(found), item.raw, item.id)
            else:
                yield item if found is None else item._replace(prompt=found)
