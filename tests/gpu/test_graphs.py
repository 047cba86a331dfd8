"""A replayed decode step is the step that was captured, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpcinfer.pipeline.graphs import CudaGraph, DecodeGraphs
from tests.checkpoints import make_variant
from tests.gpu.models import load, microbatch, tables_of
from tests.graphs import CalledAgain

VARIANTS = ("llama", "qwen3", "mixtral", "gpt-oss", "gpt2")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_replay_equals_the_eager_step_at_the_same_bucket(variant, tmp_path, device):
    model = load(make_variant(tmp_path / "model", variant), device, torch.bfloat16)
    if not model.backend.capturable:
        pytest.skip(f"{model.backend.name} cannot be captured")
    lengths = [9, 4, 17, 30, 2]
    tables, num_blocks = tables_of([length + 1 for length in lengths], 16)
    kv = model.allocate_kv(num_blocks=num_blocks, block_size=16)
    for index in range(kv.num_layers):
        for cache in kv.layer(index):
            cache.normal_()
    pool = torch.cuda.graph_pool_handle()
    replayed, eager = (
        DecodeGraphs(model, kv, make_graph=make, buckets=[2, 8], max_context=64)
        for make in (lambda: CudaGraph(pool), CalledAgain)
    )
    replayed.capture()
    eager.capture()
    rng = np.random.default_rng(0)
    for count in (5, 1, 3, 5):
        step = microbatch([[int(rng.integers(3, 200))] for _ in range(count)], lengths[:count], tables[:count])
        key = replayed.key_of([step])
        pages = [[cache.clone() for cache in kv.layer(index)] for index in range(kv.num_layers)]
        (found,) = replayed.run(key, [step], [None], None)
        found = found.clone()
        for index, caches in enumerate(pages):
            for cache, before in zip(kv.layer(index), caches, strict=True):
                cache.copy_(before)
        (wanted,) = eager.run(key, [step], [None], None)
        assert torch.equal(found, wanted), f"{variant}: {(found != wanted).sum()} of {found.numel()} numbers differ"
    replayed.close()
