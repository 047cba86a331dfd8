"""The sampler: one token for each sequence that reached the end of its known tokens.

Shape letters: S sequences that draw, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import torch

from hpcinfer.kernels.draw import draw, invert
from hpcinfer.request import NO_TOKEN_LEFT, NOT_A_TOKEN, Request
from hpcinfer.sampling.history import History
from hpcinfer.sampling.logits import on_device, probabilities
from hpcinfer.sampling.masks import PendingMasks
from hpcinfer.sampling.processors import Draw, Edit, edits_of
from hpcinfer.sampling.rng import keyed_uniform


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplingBatch:
    """The sampling parameters and draw keys of S sequences, as arrays."""

    temperature: np.ndarray
    """float64 [S]; 0 is greedy."""
    top_k: np.ndarray
    """int64 [S]."""
    top_p: np.ndarray
    """float64 [S]."""
    min_p: np.ndarray
    """float64 [S]."""
    uniforms: np.ndarray
    """float64 [S]: the keyed draw of each; unused where greedy."""
    edits: tuple[Edit, ...] = ()
    """What changes the logits before all of it, in order."""
    masks: PendingMasks | None = None
    """The tokens that constraints allow, where any row has one."""

    @property
    def is_filtered(self) -> np.ndarray:
        """bool [S]: drawn from a part of the distribution."""
        return (self.temperature > 0) & ((self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0))

    @classmethod
    def of(
        cls,
        draws: Iterable[Draw | tuple[Request, int] | tuple[Request, int, History | None]],
        eos_token_ids: frozenset[int] = frozenset(),
        *,
        masks: PendingMasks | None = None,
    ) -> SamplingBatch:
        """From the draw of each sequence.

        Args:
            eos_token_ids: the model's own, which min_tokens rules out.
            masks: of those that have a constraint.
        """
        draws = [Draw(*draw) for draw in draws]
        params = [draw.request.sampling for draw in draws]
        return cls(
            temperature=np.array([p.temperature for p in params], np.float64),
            top_k=np.array([p.top_k for p in params], np.int64),
            top_p=np.array([p.top_p for p in params], np.float64),
            min_p=np.array([p.min_p for p in params], np.float64),
            uniforms=keyed_uniform(
                np.array([p.seed for p in params], np.uint64),
                np.array([draw.request.row for draw in draws], np.uint64),
                np.array([draw.request.sample for draw in draws], np.uint64),
                np.array([draw.position for draw in draws], np.uint64),
            ),
            edits=edits_of(draws, eos_token_ids),
            masks=masks,
        )


def sample(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Draw one token a row by inverting the cumulative distribution in token-id order, in float64.

    Waits for no device: which rows are filtered is known on the host.

    Args:
        logits: float32 [S, V]; they stay as they are.
        batch: parameters and draws of the S rows.

    Returns:
        int64 [S] on the device of `logits`; NOT_A_TOKEN where the logits are not numbers, NO_TOKEN_LEFT where the batch's edits
        and masks leave none, END_WITHOUT_TOKEN where a constraint wants the row to end.
    """
    if not batch.edits and batch.masks is None:
        return _draw(logits, batch)
    edited = logits.clone(memory_format=torch.contiguous_format)
    for edit in batch.edits:
        edit.apply(edited)
    if batch.masks is not None:
        batch.masks.apply(edited)
    tokens = _draw(edited, batch)
    # Asked of the logits before the edits: what is not a number may have been ruled out, and is a failure all the same.
    numbers = logits.amax(dim=-1).isfinite()
    tokens = torch.where(numbers, tokens.where(tokens != NOT_A_TOKEN, NO_TOKEN_LEFT), NOT_A_TOKEN)
    return tokens if batch.masks is None else batch.masks.settle(tokens)


def _draw(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """float32 [S, V], edited -> int64 [S]."""
    filtered = np.flatnonzero(batch.is_filtered)
    # Filtered rows are drawn below; here they are only looked at for what is not a number.
    temperature = np.where(batch.is_filtered, 0.0, batch.temperature)
    tokens = draw(logits, *on_device((temperature, batch.uniforms), logits.device))
    if len(filtered):
        (rows,) = on_device((filtered,), logits.device)
        drawn = _draw_filtered(logits[rows], batch, filtered)
        tokens[rows] = torch.where(tokens[rows] == NOT_A_TOKEN, NOT_A_TOKEN, drawn)
    return tokens


def _draw_filtered(logits: torch.Tensor, batch: SamplingBatch, rows: np.ndarray) -> torch.Tensor:
    """logits of `rows` of the batch -> their tokens."""
    probs = probabilities(
        logits, temperature=batch.temperature[rows], top_k=batch.top_k[rows], top_p=batch.top_p[rows],
        min_p=batch.min_p[rows],
    )
    return invert(probs, *on_device((batch.uniforms[rows],), logits.device))
