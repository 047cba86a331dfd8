"""The operations of one microbatch, written down once: the formulas of the table in ARCHITECTURE.md.

Letters: T tokens of this lane, P of them on this rank (T, or ceil(T / tp) in the sequence form), S rows drawn, D model,
V vocabulary, K key/value heads of this rank, H head dim, X shared tokens of the fullest lane, L layers of the stage, M
of them mixtures, k experts of a token, b bytes of a number, R tokens of prompts whose log-probabilities are wanted, with those of
as many others each as `scored_top`. Bytes are those of the tensor that a rank hands in.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from hpcinfer.config.model import ModelConfig

ROUTED = ("experts dispatch", "experts combine")
"""In the exchanged form their bytes follow from the routing."""


class Expected(NamedTuple):
    axis: str
    verb: str
    what: str
    """The label without its layer."""
    count: int
    bytes: int | None
    """Of each; None where they follow from the routing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """What one rank of a stage is, in the letters above."""

    layers: int
    mixtures: int
    hidden: int
    vocab: int
    kv_heads: int
    head_dim: int
    experts_per_token: int
    number_bytes: int
    tp: int
    sp: int
    ep: int
    sequence_form: bool
    is_first: bool
    is_last: bool

    @classmethod
    def of(
        cls, config: ModelConfig, layers: range, *,
        tp: int, sp: int, ep: int, sequence_form: bool, number_bytes: int = 4,
    ) -> Stage:
        return cls(
            layers=len(layers), mixtures=sum(config.moe_layers[layer] for layer in layers), hidden=config.hidden_size,
            vocab=config.vocab_size, kv_heads=max(config.num_kv_heads // tp, 1), head_dim=config.head_dim,
            experts_per_token=config.experts_per_token, number_bytes=number_bytes, tp=tp, sp=sp, ep=ep,
            sequence_form=sequence_form and tp > 1,
            is_first=layers.start == 0, is_last=layers.stop == config.num_layers,
        )

    @property
    def ep_spans_lanes(self) -> bool:
        return self.sp > 1 and self.ep > 1 and self.ep == self.sp * self.tp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A microbatch as one lane sees it."""

    tokens: int
    lane_tokens: tuple[int, ...]
    shared_lens: tuple[int, ...]
    """Empty in decode, and where each lane prefills its own sequences."""
    draws: int
    is_prefill: bool
    scored: int = 0
    """R."""
    scored_top: int = 0


def operations(stage: Stage, part: Part) -> list[Expected]:
    """What a rank of `stage` issues for `part`; operations of no count are left out."""
    rows = ceil(part.tokens, stage.tp) if stage.sequence_form else part.tokens
    hidden_bytes = stage.hidden * stage.number_bytes
    expected = []
    if part.tokens:
        expected.append(Expected("pp", "recv", "activations", not stage.is_first, rows * hidden_bytes))
        expected.append(Expected("pp", "send", "activations", not stage.is_last, rows * hidden_bytes))
    if part.tokens or any(part.shared_lens) or stage.ep_spans_lanes:
        expected += tensor_parallel(stage, part) if stage.tp > 1 else []
        if any(part.shared_lens):
            kv_bytes = max(part.shared_lens) * 2 * stage.kv_heads * stage.head_dim * stage.number_bytes
            expected.append(Expected("sp", "all_gather", "kv", stage.layers, kv_bytes))
        expected += expert_parallel(stage, part) if stage.ep_spans_lanes else []
    return [one for one in expected if one.count]


def tensor_parallel(stage: Stage, part: Part) -> list[Expected]:
    """2 reductions a layer, 1 for the embedding, 1 gather of logits; a mixture whose tokens travel ends otherwise."""
    row_bytes = stage.hidden * stage.number_bytes
    travelling = stage.mixtures if stage.ep_spans_lanes else 0
    reductions = [
        ("embedding", int(stage.is_first)), ("o", stage.layers), ("down", stage.layers - stage.mixtures),
        ("experts", stage.mixtures - travelling),
    ]
    share = ceil(part.tokens, stage.tp)
    logits_bytes = part.draws * ceil(stage.vocab, stage.tp) * stage.number_bytes
    logits = Expected("tp", "all_gather", "logits", int(stage.is_last and part.draws > 0), logits_bytes)
    scored_bytes = part.scored * (24 + 16 * part.scored_top)
    logprobs = Expected("tp", "all_gather", "logprobs", int(stage.is_last and part.scored > 0), scored_bytes)
    if stage.sequence_form:
        gathers = [
            ("qkv gather", stage.layers), ("mlp gather", stage.layers - travelling),
            ("head gather", int(stage.is_last and part.draws + part.scored > 0)),
        ]
        return [
            *(Expected("tp", "reduce_scatter", what, n, share * stage.tp * row_bytes) for what, n in reductions),
            *(Expected("tp", "all_gather", what, n, share * row_bytes) for what, n in gathers), logits, logprobs,
        ]
    return [
        *(Expected("tp", "all_reduce", what, n, part.tokens * row_bytes) for what, n in reductions),
        Expected("tp", "all_gather", "shares", travelling, share * row_bytes), logits, logprobs,
    ]


def expert_parallel(stage: Stage, part: Part) -> list[Expected]:
    """Tokens travel to the ranks of all lanes: in decode by gather and scatter, in prefill by exchange."""
    if part.is_prefill:
        verb, m = "all_to_all", stage.mixtures
        return [
            Expected("ep", verb, "experts counts", m, 8 * stage.ep),
            Expected("ep", verb, "experts dispatch", m, None), Expected("ep", verb, "experts combine", m, None),
        ]
    bucket = ceil(max(part.lane_tokens), stage.tp)
    outputs_bytes = stage.ep * bucket * stage.hidden * stage.number_bytes
    return [
        Expected("ep", "all_gather", "experts dispatch", stage.mixtures, bucket * packed_bytes(stage)),
        Expected("ep", "reduce_scatter", "experts combine", stage.mixtures, outputs_bytes),
    ]


def packed_bytes(stage: Stage) -> int:
    """A token on its way to experts: hidden, then an int32 and a float32 for each of its experts."""
    return stage.hidden * stage.number_bytes + 8 * stage.experts_per_token


def own_share(stage: Stage, tokens: int, tp_rank: int) -> int:
    """Tokens that a tp rank sends to experts."""
    share = ceil(tokens, stage.tp)
    return min(max(tokens - tp_rank * share, 0), share)


def ceil(number: int, parts: int) -> int:
    return -(-number // parts)
