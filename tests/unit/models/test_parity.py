"""Logits of every family equal those of transformers (float32), however the work is cut and over however many ranks.

Tolerance 1e-4 absolute on logits of size 5-10: float32 rounding in another summation order gives 1e-6 to 1e-5 here,
and a wrong window, bias, norm or rope scaling changes them by 1e-1 or more.
"""

from __future__ import annotations

import pytest
import torch

from hpcinfer.attention.naive import NaiveBackend
from hpcinfer.attention.sdpa import SdpaBackend
from tests.checkpoints import VARIANTS, load_reference
from tests.unit.models.stages import Replica, build_stages, chunked, decoded, max_logit_error, mixed, references, whole

TOLERANCE = 1e-4
LENS = (37, 12, 1, 23)
PLANS = {
    "whole": whole(LENS), "chunks of 5": chunked(LENS, 5), "decode": decoded(LENS), "mixed": mixed(LENS),
}
BACKENDS = {"naive": NaiveBackend, "sdpa": SdpaBackend}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """variant -> (folder, sequences, logits of transformers)."""
    return references(lambda: tmp_path_factory.mktemp("checkpoint"), LENS)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_rank(reference, variant, backend, plan):
    folder, sequences, wanted = reference(variant)
    replica = Replica(build_stages(folder, BACKENDS[backend]), max_len=max(LENS), num_sequences=len(LENS))
    assert max_logit_error(replica, sequences, wanted, PLANS[plan]) < TOLERANCE


# tp 3 needs heads that it divides (and transformers' Llama a hidden_size that is a multiple of the heads).
LAYOUTS = [
    (variant, {}, tp, stages)
    for variant in ("llama-biases", "llama-kv1-tied", "mistral", "qwen2-window-tied", "qwen3-bias-tied")
    for tp, stages in ((2, 1), (4, 1), (1, 3), (2, 3))
] + [
    ("llama", {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}, 3, 1),
    ("llama", {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 8}, 3, 2),
    ("llama-kv1-tied", {"hidden_size": 36, "num_attention_heads": 6, "head_dim": 8}, 6, 2),
    ("qwen3", {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 8}, 12, 1),
    # Fewer rows and columns than ranks: the last ranks hold padding only.
    ("llama", {"vocab_size": 5, "intermediate_size": 5}, 4, 1),
    # No size of these but the heads is a multiple of tp.
    *[("gpt2", {}, tp, stages) for tp, stages in ((2, 1), (3, 3), (4, 2), (6, 1), (12, 2), (1, 3))],
    ("gpt2-as-published", {}, 3, 2),
    ("gpt2-untied", {}, 2, 3),
    ("gpt2", {"vocab_size": 5, "n_inner": 5}, 12, 1),
]


@pytest.mark.parametrize(("variant", "overrides", "tp", "num_stages"), LAYOUTS)
def test_layouts(reference, variant, overrides, tp, num_stages):
    folder, sequences, wanted = reference(variant, **overrides)
    bounds = {1: [0, 3], 2: [0, 1, 3], 3: [0, 1, 2, 3]}[num_stages]
    stages = [range(a, b) for a, b in zip(bounds, bounds[1:])]
    replica = Replica(
        build_stages(folder, SdpaBackend, tp=tp, stages=stages), max_len=max(LENS), num_sequences=len(LENS)
    )
    assert max_logit_error(replica, sequences, wanted, PLANS["mixed"]) < TOLERANCE


def test_tp_collectives_of_a_step(reference):
    """Two all-reduces a layer, one for the embedding, one gather of logits; nothing inside attention."""
    folder, sequences, _ = reference("llama")
    replica = Replica(build_stages(folder, SdpaBackend, tp=2), max_len=40, num_sequences=1)
    replica.step({0: sequences[0]})
    verbs = [(verb, label, shape) for verb, label, shape, _ in replica.log]
    wide = (37, 32)
    expected = [("all_reduce sum", "embedding", wide)]
    for layer in range(3):
        expected += [("all_reduce sum", f"layer {layer} o", wide), ("all_reduce sum", f"layer {layer} down", wide)]
    assert verbs == [*expected, ("all_gather", "logits", (1, 106))]


def test_no_logits_wanted(reference):
    """A chunk in mid-prompt draws nothing: no rows and no gather."""
    folder, sequences, _ = reference("llama")
    for tp in (1, 2):
        replica = Replica(build_stages(folder, SdpaBackend, tp=tp), max_len=40, num_sequences=1)
        assert replica.step({0: sequences[0][:5]}, samples=[False]).shape == (0, 211)
        assert not any(kind[0] == "all_gather" for kind in replica.log)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["qwen3", "gpt2"])
def test_low_precision(reference, variant, dtype):
    """Errors stay within those of transformers in the same dtype, both measured against float32."""
    folder, sequences, wanted = reference(variant)
    model = load_reference(folder, dtype)
    with torch.no_grad():
        theirs = max(
            (model(torch.from_numpy(tokens)[None]).logits[0][-1].float() - exact[-1]).abs().max().item()
            for tokens, exact in zip(sequences, wanted)
        )
    replica = Replica(build_stages(folder, SdpaBackend, dtype=dtype), max_len=max(LENS), num_sequences=len(LENS))
    assert max_logit_error(replica, sequences, wanted, PLANS["whole"]) < 2 * theirs


def test_positions_are_added_once(reference):
    """With tp the position embedding takes part in the embedding's sum and in nothing else."""
    folder, sequences, _ = reference("gpt2")
    replica = Replica(build_stages(folder, SdpaBackend, tp=2), max_len=40, num_sequences=1)
    replica.step({0: sequences[0]})
    assert [label for verb, label, *_ in replica.log if "layer" not in label] == ["embedding", "logits"]
