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
from hpcinfer.request import Generation, Request, SamplingParams, TaskParams
from hpcinfer.runner.ahead import Ahead
from hpcinfer.runner.prompt_limit import PromptLimit
from hpcinfer.sampling.grammar import Grammars

_TOKENIZE_ROWS = 64
"""Rows given to the tokenizer at a time: enough for its threads, few enough for memory."""
_TOKENIZE_LENGTH = 4 * 2**20
"""... and characters, where rows are long."""
_PATIENCE_S = 0.001
"""Waited for rows while the engine has others to work on: it lacks some, and the thread needs the interpreter to make them."""
_MOST_AHEAD = 1024
"""Requests kept ready, beside one batch."""
_MOST_AHEAD_BYTES = 64 * 2**20
"""... and bytes of token ids."""
_FAILED_AT_ONCE = 256
"""Rows that cannot be run given back at a time: a stretch of them must not keep the loop from its other duties."""

Pending = dict[int, list[tuple[int, Generation | None]]]
"""row -> (sample, partial row of an earlier life or None) of what a claim still needs."""


class RowFeed:
    """Requests for one replica, claim after claim. A thread reads and tokenises the rows of opened claims while the engine computes.

    Args:
        ledger: gives claims, and says which rows of one are still to be done.
        reader: the prompts; nobody else may use it until `close`.
        tokenizer: None where the prompts are token ids.
        sampling: of the job; a row may override it.
        limit: what becomes of too long prompts; None leaves them to `refuse`.
        refuse: raises RowError for a request that can never run (too long for the context or the K/V cache). Called in the thread.
        vocab_size: token ids of prompts must be below it.
        grammars: of the replica, for constraints.
        task: what is done with each row.
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
        limit: PromptLimit | None = None,
        grammars: Grammars | None = None,
        task: TaskParams = TaskParams(),
    ) -> None:
        self._ledger = ledger
        self._reader = reader
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._refuse = refuse
        self._task = task
        self._builder = RequestBuilder(tokenizer, vocab_size, grammars, task=task)
        self._limit = limit
        self._ahead: Ahead[Request | Generation] = Ahead(_num_bytes, max_items=_MOST_AHEAD, max_bytes=_MOST_AHEAD_BYTES)
        self._num_open = 0
        """Requests and failed rows of opened claims that were not taken yet."""
        self.state: NoClaim | None = None
        """Why the last `take` came back short; None while rows flow."""
        self.num_resumed = 0
        """Requests that go on from tokens of an earlier life."""

    def take(self, count: int, *, idle: bool = False) -> tuple[list[Request], list[Generation]]:
        """Up to `count` requests, and the rows found on the way that cannot be run (a bounded number of them). Fewer where more are not
        ready yet; it waits for the first one only with `idle`.

        Args:
            idle: nothing of this writer is in work or waits to be committed.

        Raises:
            ConfigError: a row that this start's K/V cache cannot hold, or with a structure and llguidance is not installed.
            DataError, ResumableError: the prompts cannot be read.
        """
        requests: list[Request] = []
        failed: list[Generation] = []
        self.state = None
        while len(requests) < count and len(failed) < _FAILED_AT_ONCE:
            is_first = idle and not requests and not failed
            # Claims are opened as they are needed, never ahead of that: other replicas may want them.
            if self.state is None and self._num_open < count - len(requests):
                claim = self._ledger.next_claim(idle=is_first and not self._num_open)
                if isinstance(claim, NoClaim):
                    self.state = claim
                else:
                    self._open(claim)
                continue
            item = self._ahead.take(wait_s=None if is_first else 0.0 if requests or failed else _PATIENCE_S) if self._num_open else None
            if item is None:
                self._num_open = 0 if is_first else self._num_open  # waited for, and nothing came: what is missing is offered again
                break
            self._num_open -= 1
            if isinstance(item, Request):
                requests.append(item)
                self.num_resumed += len(item.output_token_ids) > 0
            else:
                failed.append(item)
        self.state = None if self._num_open else self.state
        return requests, failed

    def close(self) -> None:
        """Prepares nothing more; rows that were not taken stay as they are in the ledger. May be called again."""
        self._ahead.close()
        self._num_open = 0

    def _open(self, claim: Claim) -> None:
        pending: Pending = {}
        for row, sample, earlier in self._ledger.remaining(claim):
            pending.setdefault(row, []).append((sample, earlier))
        self._num_open += sum(map(len, pending.values()))
        self._ahead.put(self._batches_of(pending))

    # In the thread of `Ahead` from here on: nothing below may touch the ledger ------------------------------------------

    def _batches_of(self, pending: Pending) -> Iterator[list[Request | Generation]]:
        for rows in _batches(self._rows(pending)):
            items = self._requests(rows, pending)
            while batch := list(itertools.islice(items, _TOKENIZE_ROWS)):  # a row may have thousands of samples
                yield batch

    def _rows(self, pending: Pending) -> Iterator[PromptRow]:
        if pending:
            for row in self._reader.rows(min(pending), max(pending) + 1):
                if row.row in pending:
                    yield row

    def _requests(self, rows: list[PromptRow], pending: Pending) -> Iterator[Request | Generation]:
        texts = [row.text for row in rows if row.text is not None and row.continuation is None]
        encoded, continued = iter(self._encode(texts)), self._encode_continued(rows)
        for row in rows:
            score_from = 1
            if row.row in continued:
                token_ids, score_from = continued[row.row]
            else:
                token_ids = next(encoded) if row.text is not None else row.token_ids
            for sample, earlier in pending[row.row]:
                yield self._request(row, sample, token_ids, earlier, score_from)

    def _encode_continued(self, rows: list[PromptRow]) -> dict[int, tuple[np.ndarray | RowError, int]]:
        """Row -> token ids of prompt and continuation, and where the continuation begins; of the rows that have one."""
        found = {
            row.row: (np.concatenate([row.token_ids, row.continuation]), len(row.token_ids))
            for row in rows if row.continuation is not None and row.token_ids is not None
        }
        texts = [row for row in rows if row.continuation is not None and row.text is not None]
        if texts and self._tokenizer is None:
            return found | {row.row: (self._encode([row.text])[0], 1) for row in texts}
        if texts:
            pairs = self._tokenizer.encode_continued([row.text for row in texts], [row.continuation for row in texts])
            found |= {row.row: (pair, 1) if isinstance(pair, RowError) else pair for row, pair in zip(texts, pairs, strict=True)}
        return found

    def _encode(self, texts: list[str]) -> list[np.ndarray | RowError]:
        if self._tokenizer is None:
            return [RowError("the prompt is text, and the model folder has no tokenizer.json")] * len(texts)
        return self._tokenizer.encode_batch(texts) if texts else []

    def _request(
        self, row: PromptRow, sample: int, token_ids: np.ndarray | RowError | None, earlier: Generation | None,
        score_from: int,
    ) -> Request | Generation:
        num_tokens = 0
        try:
            sampling = sampling_for(row, self._sampling)
            if isinstance(token_ids, RowError):
                raise token_ids
            num_tokens = len(token_ids)
            max_tokens = sampling.max_tokens if self._task.generates else 1
            if self._limit is not None and row.continuation is not None:
                token_ids, score_from = self._limit.fit_continued(token_ids, max_tokens, score_from)
            elif self._limit is not None:
                token_ids = self._limit.fit(token_ids, max_tokens)
            request = self._builder.build(
                row=row.row, sample=sample, prompt_token_ids=token_ids, sampling=sampling, earlier=earlier,
                score_from=max(1, score_from),
            )
            self._refuse(request)
        except RowError as error:
            return failed_generation(row.row, sample, str(error), num_tokens)
        return request


def _batches(rows: Iterator[PromptRow]) -> Iterator[list[PromptRow]]:
    """Rows to be tokenised together."""
    batch: list[PromptRow] = []
    length = 0
    for row in rows:
        batch.append(row)
        length += len(row.text) if row.text is not None else 0
        if len(batch) >= _TOKENIZE_ROWS or length >= _TOKENIZE_LENGTH:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def _num_bytes(item: Request | Generation) -> int:
    return item.prompt_token_ids.nbytes + item.output_token_ids.nbytes if isinstance(item, Request) else len(item.error)
