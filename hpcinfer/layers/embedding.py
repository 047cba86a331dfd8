"""Embedding and head, split over the ranks by vocabulary.

Shape letters: T tokens, P of them on this rank, D model, V vocabulary, S rows whose logits are wanted, R rows of which the
log-probability of a token is wanted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hpcinfer.comm.communicator import Communicator
from hpcinfer.kernels.logprobs import join_shards, reduce_shard
from hpcinfer.parallel.segments import Segments
from hpcinfer.parallel.tensor import TokenStream
from hpcinfer.layers.shard import check_shape, copy_shard, part_range, part_size

_LOGITS_AT_ONCE = 2**24
"""Logits of a prompt that a rank makes at a time: far fewer than a step may draw from."""


class VocabParallelEmbedding:
    """Token embedding; rank r holds rows r * ceil(V / ranks) and on, the last ranks padded with zeros.

    Args:
        vocab_size: V, any size.
        hidden_size: D.
        stream: of the stage; the vocabulary is split over its ranks.
        dtype, device: of the weight.
    """

    split_dim = 0

    def __init__(
        self, vocab_size: int, hidden_size: int, *, stream: TokenStream, dtype: torch.dtype, device: torch.device
    ) -> None:
        tp = stream.tp
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self._stream = stream
        self._start, self._end = part_range(vocab_size, tp.size, tp.rank)
        self.weight = torch.zeros(part_size(vocab_size, tp.size), hidden_size, dtype=dtype, device=device)

    def load_weight(self, full: torch.Tensor) -> None:
        """Take this rank's rows of the full weight [V, D]."""
        check_shape(full, (self.vocab_size, self.hidden_size), "embedding weight")
        copy_shard(self.weight, full, self.split_dim, self._start, self._end)

    def forward(self, token_ids: torch.Tensor, added: torch.Tensor | None = None) -> Segments:
        """token_ids int64 [T], each from 0 to V - 1 -> [P, D]. Collective: one reduction over tp when it is split.

        `added` [T, D] is one rank's addition to the sum (learned positions), None on the others.
        """
        if self._stream.tp.size == 1:
            hidden = F.embedding(token_ids, self.weight)
            return hidden if added is None else hidden.add_(added)
        # Every token is looked up by the one rank that has its row; the others add zeros, so the sum is exact.
        foreign = (token_ids < self._start) | (token_ids >= self._end)
        rows = (token_ids - self._start).masked_fill_(foreign, 0)
        hidden = F.embedding(rows, self.weight).masked_fill_(foreign[:, None], 0)
        if added is not None:
            hidden.add_(added)
        hidden = yield from self._stream.reduce(hidden, label="embedding")
        return hidden


class ParallelHead:
    """The projection to logits, split by vocabulary like the embedding.

    Args:
        tied: an embedding of this stage whose weight is used; None: the head has its own storage.
    """

    split_dim = 0

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        tp: Communicator,
        dtype: torch.dtype,
        device: torch.device,
        tied: VocabParallelEmbedding | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self._tp = tp
        self._range = part_range(vocab_size, tp.size, tp.rank)
        self.weight = (
            tied.weight if tied is not None
            else torch.zeros(part_size(vocab_size, tp.size), hidden_size, dtype=dtype, device=device)
        )

    def load_weight(self, full: torch.Tensor) -> None:
        """Take this rank's rows of the full weight [V, D]."""
        check_shape(full, (self.vocab_size, self.hidden_size), "head weight")
        copy_shard(self.weight, full, self.split_dim, *self._range)

    def forward(self, hidden: torch.Tensor) -> Segments:
        """hidden [S, D] -> float32 [S, V] on every rank. Collective: one all-gather over tp when split and S > 0."""
        logits = F.linear(hidden, self.weight)
        if self._tp.size == 1:
            return logits.float()
        if logits.shape[0] == 0:
            return logits.new_empty((0, self.vocab_size), dtype=torch.float32)
        gathered = yield self._tp.all_gather(logits, label="logits")
        joined = gathered.new_empty((logits.shape[0], self.vocab_size), dtype=torch.float32)
        for rank, part in enumerate(gathered.view(self._tp.size, *logits.shape)):
            start, end = part_range(self.vocab_size, self._tp.size, rank)
            joined[:, start:end] = part[:, : end - start]
        return joined

    def logprobs(self, hidden: torch.Tensor, tokens: torch.Tensor, num_top: int) -> Segments:
        """The log-probabilities of tokens int64 [R] after hidden [R, D], on every rank, with those of the `num_top` most likely ones.

        Logits are made for a few rows at a time and stay on their rank. Collective: one all-gather over tp when split; R > 0.

        Returns (as the generator's value):
            int32 [R, 1 + 2 num_top], see `kernels.logprobs.join_shards`.
        """
        start, end = self._range
        rows = max(1, _LOGITS_AT_ONCE // self.weight.shape[0])
        reduced = torch.cat([
            reduce_shard(F.linear(some, self.weight)[:, : end - start], of, start=start, num_top=num_top)
            for some, of in zip(hidden.split(rows), tokens.split(rows), strict=True)
        ])
        if self._tp.size == 1:
            return join_shards(reduced[None], num_top)
        gathered = yield self._tp.all_gather(reduced, label="logprobs")
        return join_shards(gathered.view(self._tp.size, *reduced.shape), num_top)
