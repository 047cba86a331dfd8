"""Whole models with every operation in Triton's interpreter: each layer hands its kernels what they expect.

Tolerance as in tests/unit/models: 1e-4 on float32 logits of size 5 to 10, where a wrong norm, slot, gate or expert changes
them by 1e-1 or more. The kernels themselves are compared number by number in test_kernels.
"""

from __future__ import annotations

import pytest
import torch

from hpcinfer.attention.sdpa import SdpaBackend
from tests.checkpoints import make_variant
from tests.unit.kernels.twins import twins_everywhere
from tests.unit.models import test_shared_tokens
from tests.unit.models.stages import Replica, build_stages

# As in test_kernels.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning")

TOLERANCE = 1e-4
STEPS = ({0: 7, 1: 2}, {0: 1, 1: 1})
"""Tokens of each sequence: a prefill, then a decode."""
DENSE, MIXTURE = {"norm", "rotary", "gate"}, {"norm", "rotary", "routing", "experts"}
MODELS = [
    # variant, layout, files of which an operation is used
    pytest.param("llama-biases", {"tp": 2}, DENSE, marks=pytest.mark.full),
    ("qwen3", {"tp": 2, "sequence_form": True}, DENSE),
    ("gpt2", {"stages": [range(0, 1), range(1, 3)]}, {"rotary"}),
    pytest.param("mixtral", {"tp": 2, "ep": 2}, MIXTURE, marks=pytest.mark.full),
    ("qwen3-moe", {}, DENSE | MIXTURE),
    pytest.param("gpt-oss-mxfp4", {"tp": 2, "ep": 2, "packed_experts": True}, MIXTURE, marks=pytest.mark.full),
]


def logits(folder, layout: dict) -> list[torch.Tensor]:
    """Of the last token of every sequence after each step."""
    replica = Replica(build_stages(folder, SdpaBackend, **layout), max_len=12, num_sequences=2)
    generator = torch.Generator().manual_seed(1)
    return [
        replica.step({row: torch.randint(3, 200, (count,), generator=generator).numpy() for row, count in chunks.items()})
        for chunks in STEPS
    ]


@pytest.mark.parametrize(("variant", "layout", "files"), MODELS)
def test_logits(variant, layout, files, tmp_path):
    folder = make_variant(tmp_path, variant)
    wanted = logits(folder, layout)
    with twins_everywhere() as used:
        got = logits(folder, layout)
    assert used == files
    for a, b in zip(got, wanted):
        assert (a - b).abs().max() < TOLERANCE


@pytest.mark.full
def test_tokens_shared_by_lanes(tmp_path):
    with twins_everywhere():
        test_shared_tokens.test_logits_are_those_of_one_lane(tmp_path, "qwen3-bias-tied", False)
