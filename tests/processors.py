"""The logits processors of a row as transformers has them, and vLLM's penalties, for which it has none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from hpcinfer.request import SamplingParams


def by_transformers(
    logits: torch.Tensor, prompt: Sequence[int], output: Sequence[int], row: dict, *, ends: Sequence[int]
) -> torch.Tensor:
    """float32 [1, V] -> the same, after all processors in the order of `generate`.

    Args:
        row: "sampling" and "bad_words" (lists of token ids).
        ends: the model's end-of-sequence ids.
    """
    sampling, scores = SamplingParams(**row["sampling"]), logits
    ids = torch.tensor([[*prompt, *output]])
    if sampling.logit_bias:
        scores = SequenceBiasLogitsProcessor([[[i], bias] for i, bias in sampling.logit_bias.items()])(ids, scores)
    if sampling.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores)
    counts = torch.bincount(torch.tensor([*output], dtype=torch.long), minlength=logits.shape[-1]).double()
    taken = sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0).double()
    scores = scores - taken.float()
    if row["bad_words"]:
        scores = NoBadWordsLogitsProcessor([list(word) for word in row["bad_words"]])(ids, scores)
    if sampling.min_tokens:
        stops = sorted({*ends, *sampling.stop_token_ids})
        scores = MinNewTokensLengthLogitsProcessor(len(prompt), sampling.min_tokens, stops)(ids, scores)
    return scores
