"""The residual stream in token shards computes what the replicated one does, with other transfers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpcinfer.attention.sdpa import SdpaBackend
from tests.checkpoints import make_variant
from tests.unit.models.stages import Replica, build_stages

TP3 = {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3}
# Tokens of a step: a multiple of neither 2 nor 3, one decode, fewer tokens than ranks, a mixture.
STEPS = [{0: 17, 1: 6}, {0: 1}, {0: 1, 1: 1}, {1: 11, 0: 2}]
LAYOUTS = [
    ("llama", {}, 2, [range(3)]), ("llama-biases", {}, 4, [range(1), range(1, 3)]),
    ("llama", TP3, 3, [range(2), range(2, 3)]),
    ("qwen3-bias-tied", {}, 2, [range(3)]),
    ("gpt2", {}, 2, [range(3)]), ("gpt2", {}, 3, [range(1), range(1, 3)]), ("gpt2-untied", {}, 12, [range(3)]),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(variant, overrides) -> folder."""
    made = {}

    def get(variant: str, **overrides):
        key = (variant, *sorted(overrides.items()))
        if key not in made:
            made[key] = make_variant(tmp_path_factory.mktemp("checkpoint"), variant, **overrides)
        return made[key]

    return get


def replicas(folder, tp: int, stages: list[range]) -> list[Replica]:
    """The model in the replicated and in the sequence form."""
    return [
        Replica(
            build_stages(folder, SdpaBackend, tp=tp, stages=stages, sequence_form=form), max_len=40, num_sequences=2
        )
        for form in (False, True)
    ]


def chunks(replica: Replica, sizes: dict[int, int]) -> dict[int, np.ndarray]:
    """The next tokens of each sequence: arbitrary ones, fixed by sequence and position."""
    return {i: (np.arange(replica.context[i], replica.context[i] + n) * 37 + i) % 211 for i, n in sizes.items()}


@pytest.mark.parametrize(("variant", "overrides", "tp", "stages"), LAYOUTS)
def test_logits_are_those_of_the_replicated_form(checkpoint, variant, overrides, tp, stages):
    whole, sharded = replicas(checkpoint(variant, **overrides), tp, stages)
    for sizes in STEPS:
        wanted = whole.step(chunks(whole, sizes))
        # Logits are 5 to 10 in size; a part that is lost or counted twice changes them by far more.
        torch.testing.assert_close(sharded.step(chunks(sharded, sizes)), wanted, rtol=0, atol=1e-5)
        assert wanted.std() > 1


@pytest.mark.parametrize(("variant", "width"), [("llama", 32), ("gpt2", 48)])
def test_transfers(checkpoint, variant, width):
    """Two all-gathers and two reduce-scatters a layer, each of 1/tp of the tokens on every rank."""
    _, sharded = replicas(checkpoint(variant), 2, [range(3)])
    sharded.step(chunks(sharded, {0: 16, 1: 7}))
    part, padded = (12, width), (24, width)
    expected = [("reduce_scatter", "embedding", padded)]
    for layer in range(3):
        expected += [
            ("all_gather", f"layer {layer} qkv gather", part), ("reduce_scatter", f"layer {layer} o", padded),
            ("all_gather", f"layer {layer} mlp gather", part), ("reduce_scatter", f"layer {layer} down", padded),
        ]
    expected += [("all_gather", "head gather", part), ("all_gather", "logits", (2, 106))]
    assert [(verb, label, shape) for verb, label, shape, _ in sharded.log] == expected


def test_a_stage_without_tokens_keeps_step(checkpoint):
    """A lane may have none: its ranks still take part in every transfer."""
    _, sharded = replicas(checkpoint("gpt2"), 2, [range(3)])
    sharded.step(chunks(sharded, {0: 5}), samples=[False])
    transfers = len(sharded.log)
    sharded.log.clear()
    assert sharded.step({}).shape == (0, 211)
    assert len(sharded.log) == transfers
