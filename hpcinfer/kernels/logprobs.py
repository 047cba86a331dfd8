"""Log-probabilities of given tokens and of the most likely ones, where the vocabulary may lie on several ranks.

Each rank reduces its own columns of the logits to a few numbers a row (`reduce_shard`); from those of all ranks come the
log-probabilities (`join_shards`), so that no rank needs all logits. Sums are in float64: their rounding depends on neither the split
nor the number of rows. Shape letters: R rows, V vocabulary, W columns of this rank, k most likely tokens, n ranks.
"""

from __future__ import annotations

import numpy as np
import torch

from hpcinfer.request import TokenLogprobs

_VALUES_AT_ONCE = 2**22
"""Logits that are widened to float64 at a time."""
_NO_TOKEN = -1


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, num_top: int) -> torch.Tensor:
    """The log-probabilities of `tokens` int64 [R] under logits [R, V], which are all on this rank: as `join_shards` gives them."""
    return join_shards(reduce_shard(logits, tokens, start=0, num_top=num_top)[None], num_top)


def reduce_shard(logits: torch.Tensor, tokens: torch.Tensor, *, start: int, num_top: int) -> torch.Tensor:
    """What one rank contributes.

    Args:
        logits: [R, W], of the tokens from `start` on; W may be 0.
        tokens: int64 [R], any of the vocabulary.
        num_top: k.

    Returns:
        float64 [R, 3 + 2k]: the largest logit, the sum of exp(logit - largest), the token's logit (-inf where it is another
        rank's), the k largest logits, their token ids (-1 where W < k).
    """
    rows = max(1, _VALUES_AT_ONCE // max(1, logits.shape[1]))
    parts = [
        _reduce(some, of, start, num_top) for some, of in zip(logits.split(rows), tokens.split(rows), strict=True)
    ]
    return torch.cat(parts)


def _reduce(logits: torch.Tensor, tokens: torch.Tensor, start: int, num_top: int) -> torch.Tensor:
    num_rows, width = logits.shape
    reduced = torch.full((num_rows, 3 + 2 * num_top), float("-inf"), dtype=torch.float64, device=logits.device)
    reduced[:, 1] = 0.0
    reduced[:, 3 + num_top :] = _NO_TOKEN
    if width == 0:
        return reduced
    wide = logits.double()
    largest = wide.amax(dim=-1, keepdim=True)
    reduced[:, 0] = largest[:, 0]
    reduced[:, 1] = (wide - largest).exp().sum(dim=-1)
    own = (tokens >= start) & (tokens < start + width)
    columns = (tokens - start).clamp(0, width - 1)[:, None]
    reduced[:, 2] = wide.gather(1, columns)[:, 0].masked_fill(~own, float("-inf"))
    if num_top:
        ids = torch.arange(start, start + width, device=logits.device)
        best = _order(logits.float(), ids).topk(min(num_top, width), dim=-1).indices
        reduced[:, 3 : 3 + best.shape[1]] = wide.gather(1, best)
        reduced[:, 3 + num_top : 3 + num_top + best.shape[1]] = (best + start).double()
    return reduced


def join_shards(reduced: torch.Tensor, num_top: int) -> torch.Tensor:
    """The log-probabilities of each row, packed so that they travel as one; `unpacked` is the inverse.

    Args:
        reduced: float64 [n, R, 3 + 2k], what every rank has contributed.
        num_top: k.

    Returns:
        int32 [R, 1 + 2k]: the token's log-probability and the k largest ones, the best first, as bits of float32; the k token
        ids, of equally likely tokens the lowest first.
    """
    largest, sums, logit = reduced[:, :, 0], reduced[:, :, 1], reduced[:, :, 2]
    best = largest.amax(dim=0)
    log_sum = best + (sums * (largest - best).exp()).sum(dim=0).log()
    chosen = logit.amax(dim=0) - log_sum
    values = reduced[:, :, 3 : 3 + num_top].transpose(0, 1).flatten(1)
    ids = reduced[:, :, 3 + num_top :].transpose(0, 1).flatten(1).long()
    order = _order(values.float(), ids).topk(num_top, dim=-1).indices
    floats = torch.cat([chosen[:, None], values.gather(1, order) - log_sum[:, None]], dim=1).float()
    return torch.cat([floats.view(torch.int32), ids.gather(1, order).int()], dim=1)


def _order(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """int64 keys by which tokens are ranked: by float32 logits, of equal ones the lowest id is the largest. No two are equal, so that the
    k largest are the same however they are looked for.
    """
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 makes one zero of two
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ascending.long() << 32) + (0x7FFFFFFF - ids)


def narrowed(packed: np.ndarray, num_top: int) -> np.ndarray:
    """int32 [R, 1 + 2k] with the first `num_top` of the k most likely tokens alone, in memory of its own."""
    most = (packed.shape[1] - 1) // 2
    return np.concatenate([packed[:, : 1 + num_top], packed[:, 1 + most : 1 + most + num_top]], axis=1)


def unpacked(packed: np.ndarray) -> TokenLogprobs:
    """The numbers in int32 [R, 1 + 2k]."""
    num_top = (packed.shape[1] - 1) // 2
    floats = packed[:, : 1 + num_top].copy().view(np.float32)
    return TokenLogprobs(floats[:, 0], packed[:, 1 + num_top :].copy(), floats[:, 1:])
