"""Logits of every family on a GPU against the CPU in float32.

Relative error by dtype: float32 differs in the order of sums alone, a few thousand roundings of 2**-24 (TF32 is off); float16
rounds to 2**-11 and bfloat16 to 2**-8 at each of about ten operations of a layer, which add up like a random walk over the
layers; the weights themselves are rounded once.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.checkpoints import VARIANTS, make_variant
from tests.gpu.models import CPU, load, logits_of_prompts_and_decodes

RELATIVE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1.5e-1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def get(variant: str):
        if variant not in made:
            made[variant] = make_variant(tmp_path_factory.mktemp(variant), variant)
        return made[variant]

    return get


def texts(vocab_size: int) -> tuple[list[list[int]], list[list[int]]]:
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, vocab_size, length).tolist() for length in (1, 5, 17, 40)]
    return prompts, [rng.integers(3, vocab_size, 6).tolist() for _ in prompts]


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(variant, dtype, folders, device):
    folder = folders(variant)
    reference = load(folder, CPU, torch.float32)
    prompts, more = texts(reference.config.vocab_size)
    wanted = logits_of_prompts_and_decodes(reference, prompts, more)
    found = logits_of_prompts_and_decodes(load(folder, device, dtype), prompts, more)
    error = (found - wanted).norm() / wanted.norm()
    assert torch.isfinite(found).all() and error < RELATIVE[dtype], f"{variant} {dtype}: relative error {error:.2e}"
