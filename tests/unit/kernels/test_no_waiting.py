"""A decode step never makes the host wait for the device, so that it can be captured in a CUDA graph.

Seen without a GPU: tensors of device "meta" have no numbers, so that whatever needs one on the host is an error. With one,
`tests/gpu` has the same under torch's own check.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from hpcinfer.batch import Reading
from hpcinfer.kernels.logprobs import token_logprobs
from hpcinfer.models.base import Readout
from hpcinfer.parallel.segments import run_to_end
from hpcinfer.sampling.sampler import SamplingBatch, sample
from tests.unit.kernels.launches import recorded
from tests.unit.kernels.models import MODELS, inputs, stage

META = torch.device("meta")


@pytest.mark.parametrize("name", MODELS)
def test_a_step(name):
    with recorded([], {}):
        model = stage(MODELS[name], dtype=torch.bfloat16, device=META)
        kv = model.allocate_kv(num_blocks=8, block_size=16)
        made = inputs([1] * 5, META)
        padded = dataclasses.replace(made.metadata, valid=torch.ones(5, dtype=torch.bool, device=META))
        logits = run_to_end(model.forward(dataclasses.replace(made, metadata=padded), kv))
        assert logits.shape == (5, MODELS[name].vocab_size)
        for filters in ({}, {"top_k": [0, 9, 0, 3, 0]}, {"top_p": [1, 0.5, 1, 1, 0.1], "min_p": [0, 0, 0.2, 0, 0]}):
            tokens = sample(logits, batch(5, **filters))
            assert tokens.shape == (5,)
        assert token_logprobs(logits, tokens, 3).shape == (5, 7)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_read_beside_logits(name):
    with recorded([], {}):
        model = stage(MODELS[name], dtype=torch.bfloat16, device=META)
        kv = model.allocate_kv(num_blocks=8, block_size=16)
        readout = Readout(Reading(targets=np.array([-1, 3, 4, 1, 2]), num_top=2, pools=((0, 5), (2, 3))), META)
        run_to_end(model.forward(dataclasses.replace(inputs([3, 2], META), readout=readout), kv))
        assert readout.logprobs.shape == (4, 5) and readout.logprobs.dtype == torch.int32
        assert readout.pooled.shape == (2, MODELS[name].hidden_size) and readout.pooled.dtype == torch.float64


def batch(rows: int, **filters: list) -> SamplingBatch:
    """Rows with these filters, the first one greedy."""
    plain = {"top_k": [0] * rows, "top_p": [1.0] * rows, "min_p": [0.0] * rows}
    arrays = {name: np.array(values, np.int64 if name == "top_k" else np.float64) for name, values in (plain | filters).items()}
    return SamplingBatch(temperature=np.array([0.0] + [0.8] * (rows - 1)), uniforms=np.full(rows, 0.5), **arrays)


def test_this_test_can_fail():
    """What waits on a GPU is an error on tensors without numbers."""
    ids = torch.zeros(4, dtype=torch.int64, device=META)
    for waits in (lambda: ids.tolist(), lambda: ids.nonzero(), lambda: torch.bincount(ids), lambda: bool((ids > 0).any())):
        with pytest.raises((RuntimeError, NotImplementedError)):
            waits()
