"""Attention over the pages of one sequence in float32, as the stand-ins of GPU libraries compute it."""

from __future__ import annotations

import torch


def attend(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    pages: torch.Tensor,
    length: int,
    *,
    scale: float,
    left: int,
    softcap: float,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [t, N, H]: the last t of `length` tokens, in whose pages the keys and values lie. Causal; `left` tokens before a query are
    seen beside it, -1: all. Returns [t, N, H] in q's dtype."""
    num_tokens, num_heads, _ = q.shape
    k, v = (cache[pages.long()].flatten(0, 1)[:length].float() for cache in (k_pages, v_pages))
    k, v = (part.repeat_interleave(num_heads // part.shape[1], dim=1) for part in (k, v))
    scores = torch.einsum("tnh,lnh->ntl", q.float(), k) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    queries = torch.arange(length - num_tokens, length)[:, None]
    keys = torch.arange(length)[None]
    hidden = keys > queries
    if left >= 0:
        hidden |= keys < queries - left
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(-1, num_tokens, 1)), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :length]
    return torch.einsum("ntl,lnh->tnh", weights, v).to(q.dtype)
