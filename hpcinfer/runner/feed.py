"""The feed: from claims to requests. What cannot be run becomes a failed row here; the rows around it go on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from hpcinfer.data.ledger.claims import Claim, Ledger, NoClaim
from hpcinfer.data.prompts.prompt_row import PromptRow, PromptsReader, sampling_for
from hpcinfer.data.tokenize import Tokenizer
from hpcinfer.engine.outcome import failed_generation
from hpcinfer.engine.requests import RequestBuilder
from hpcinfer.errors import RowError
from hpcinfer.request import Generation, Request, SamplingParams
from hpcinfer.sampling.grammar import Grammars

_TOKENIZE_ROWS = 64
"""Rows given to the tokenizer at a time: enough for its threads, few enough for memory."""
_FAILED_AT_ONCE = 256
"""Rows that cannot be run given back at a time: a stretch of them must not keep the loop from its other duties."""

Pending = dict[int, list[tuple[int, np.ndarray | None]]]
"""row -> (sample, token ids of an earlier life or None) of what a claim still needs."""


class RowFeed:
    """Requests for one replica, claim after claim.

    Args:
        ledger: gives claims, and says which rows of one are still to be done.
        reader: the prompts.
        tokenizer: None where the prompts are token ids.
        sampling: of the job; a row may override it.
        refuse: raises RowError for a request that can never run (too long for the context or the K/V cache).
        vocab_size: token ids of prompts must be below it.
        grammars: of the replica, for constraints.
    """

    def __init__(
        self,
        ledger: Ledger,
        reader: PromptsReader,
        tokenizer: Tokenizer | None,
        sampling: SamplingParams,
        *,
        refuse: Callable[[Request], None],
        vocab_size: int,
        grammars: Grammars | None = None,
    ) -> None:
        self._ledger = ledger
        self._reader = reader
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._refuse = refuse
        self._builder = RequestBuilder(tokenizer, vocab_size, grammars)
        self._open: Iterator[Request | Generation] = iter(())
        self.state: NoClaim | None = None
        """Why the last `take` came back short; None while rows flow."""
        self.num_resumed = 0
        """Requests that go on from tokens of an earlier life."""

    def take(self, count: int, *, idle: bool = False) -> tuple[list[Request], list[Generation]]:
        """Up to `count` requests, and the rows found on the way that cannot be run (a bounded number of them).

        Args:
            idle: nothing of this writer is in work or waits to be committed.

        Raises:
            ConfigError: a row that this start's K/V cache cannot hold, or with a structure and llguidance is not installed.
        """
        requests: list[Request] = []
        failed: list[Generation] = []
        self.state = None
        while len(requests) < count and len(failed) < _FAILED_AT_ONCE:
            item = next(self._open, None)
            if item is None:
                claim = self._ledger.next_claim(idle=idle and not requests and not failed)
                if isinstance(claim, NoClaim):
                    self.state = claim
                    break
                self._open = self._items(claim)
            elif isinstance(item, Request):
                requests.append(item)
                self.num_resumed += len(item.output_token_ids) > 0
            else:
                failed.append(item)
        return requests, failed

    def _items(self, claim: Claim) -> Iterator[Request | Generation]:
        pending: Pending = {}
        for row, sample, earlier in self._ledger.remaining(claim):
            pending.setdefault(row, []).append((sample, earlier))
        for rows in _batches(row for row in self._rows(claim, pending)):
            yield from self._requests(rows, pending)

    def _rows(self, claim: Claim, pending: Pending) -> Iterator[PromptRow]:
        if pending:
            for row in self._reader.rows(min(pending), max(pending) + 1):
                if row.row in pending:
                    yield row

    def _requests(self, rows: list[PromptRow], pending: Pending) -> Iterator[Request | Generation]:
        texts = [row.text for row in rows if row.text is not None]
        encoded = iter(self._encode(texts))
        for row in rows:
            token_ids = next(encoded) if row.text is not None else row.token_ids
            for sample, earlier in pending[row.row]:
                yield self._request(row, sample, token_ids, earlier)

    def _encode(self, texts: list[str]) -> list[np.ndarray | RowError]:
        if self._tokenizer is None:
            return [RowError("the prompt is text, and the model folder has no tokenizer.json")] * len(texts)
        return self._tokenizer.encode_batch(texts) if texts else []

    def _request(
        self, row: PromptRow, sample: int, token_ids: np.ndarray | RowError | None, earlier: np.ndarray | None
    ) -> Request | Generation:
        num_tokens = 0
        try:
            sampling = sampling_for(row, self._sampling)
            if isinstance(token_ids, RowError):
                raise token_ids
            num_tokens = len(token_ids)
            request = self._builder.build(
                row=row.row, sample=sample, prompt_token_ids=token_ids, sampling=sampling, output_token_ids=earlier
            )
            self._refuse(request)
        except RowError as error:
            return failed_generation(row.row, sample, str(error), num_tokens)
        return request


def _batches(rows: Iterator[PromptRow]) -> Iterator[list[PromptRow]]:
    while batch := list(itertools.islice(rows, _TOKENIZE_ROWS)):
        yield batch
