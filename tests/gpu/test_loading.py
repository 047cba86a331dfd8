"""Loading onto a GPU: page-locked buffers, weights equal to those on the CPU, nothing left behind."""

from __future__ import annotations

import pytest
import torch

from hpcinfer.attention.naive import NaiveBackend
from hpcinfer.comm.bootstrap import local_world
from hpcinfer.comm.local import LocalCommunicator
from hpcinfer.config.model import ModelConfig
from hpcinfer.models.base import StageModel
from hpcinfer.models.checkpoint import Checkpoint
from hpcinfer.models.extent_reader import ExtentReader
from hpcinfer.models.extents import plan_extents
from hpcinfer.models.registry import model_class
from hpcinfer.models.weights import load_stage
from hpcinfer.parallel.axes import StageAxes
from tests.checkpoints import make_checkpoint
from tests.plain_weights import assert_same_weights, fill_plainly

EXTENT_BYTES = 1_000_003
"""Odd, so that tensors lie at odd places in the buffers."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """25 MB in several shards."""
    return make_checkpoint(
        tmp_path_factory.mktemp("checkpoint"), max_shard_size="4MB", dtype=torch.bfloat16, hidden_size=512,
        intermediate_size=1500, vocab_size=4001, num_hidden_layers=3,
    )


def make_stage(folder, device: torch.device) -> StageModel:
    config = ModelConfig.from_folder(folder)
    return model_class(config)(
        config, layers=range(config.num_layers), axes=StageAxes(tp=LocalCommunicator("tp", device)), backend=NaiveBackend(),
        dtype=torch.bfloat16, device=device,
    )


@pytest.mark.parametrize("extent_bytes", [EXTENT_BYTES, 2**26])
def test_weights_on_the_gpu_are_those_of_the_files(folder, device, extent_bytes):
    stage, wanted = make_stage(folder, device), make_stage(folder, torch.device("cpu"))
    fill_plainly(wanted, folder)
    figures = load_stage(stage, Checkpoint(folder), local_world(), extent_bytes=extent_bytes)
    assert_same_weights(stage, wanted)
    assert figures.read_bytes == figures.total_bytes > 2e7


def test_nothing_is_left_behind(folder, device):
    """While it lasts: two extents, the tensor that is put together, and an aligned copy of it."""
    stage, checkpoint = make_stage(folder, device), Checkpoint(folder)
    largest = max(checkpoint.entry(name).num_bytes for name in checkpoint.names())
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    load_stage(stage, checkpoint, local_world(), extent_bytes=EXTENT_BYTES)
    assert torch.cuda.memory_allocated(device) == before
    assert torch.cuda.max_memory_allocated(device) - before <= 2 * (EXTENT_BYTES + 512) + 2 * largest + 4096


def test_a_page_locked_buffer_is_not_filled_before_its_copy_is_over(folder, device):
    """The stream is kept busy, so that a copy that did not wait would still be queued when its buffer is filled again."""
    checkpoint = Checkpoint(folder)
    entries = {name: checkpoint.entry(name) for name in checkpoint.names()}
    extents = plan_extents(entries, EXTENT_BYTES)
    busy = torch.randn(4096, 4096, device=device)
    copies = []
    with ExtentReader(extents, pin=True) as reader:
        assert all(buffer.is_pinned() for _, buffer, _ in reader._begun)
        for extent in extents:
            for _ in range(4):
                busy = (busy @ busy).clamp(-1, 1)
            copies.append(torch.empty(extent.num_bytes, dtype=torch.uint8, device=device))
            reader.take(copies[-1])
    for extent, copy in zip(extents, copies, strict=True):
        for part in extent.ranges():
            stored = part.path.read_bytes()[part.start : part.start + part.num_bytes]
            assert copy[part.offset : part.offset + part.num_bytes].cpu().numpy().tobytes() == stored
