"""How many pages a rank gets, and what is said when they do not fit."""

from __future__ import annotations

import pytest

from hpcinfer.config.job import EngineSection
from hpcinfer.config.model import ModelConfig
from hpcinfer.config.parallel import ParallelConfig
from hpcinfer.engine.memory import context_limit, num_kv_blocks
from hpcinfer.errors import ConfigError
from hpcinfer.launch.host_memory import available_host_bytes, cgroup_free_bytes
from hpcinfer.models.footprint import kv_bytes_per_token, weight_bytes

MODEL = ModelConfig(
    family="LlamaForCausalLM", vocab_size=1000, hidden_size=64, intermediate_size=128, num_layers=4, num_heads=4,
    num_kv_heads=2, head_dim=16, max_position_embeddings=256,
)
GIB = 2**30


def blocks(available_bytes=GIB, tp=1, layers=range(4), block_size=16, **engine) -> int:
    return num_kv_blocks(
        MODEL, EngineSection(**engine), layers=layers, parallel=ParallelConfig(tp=tp), block_size=block_size, dtype="float32",
        available_bytes=available_bytes,
    )


def test_a_setting_in_bytes_gives_its_pages_and_page_zero():
    page = kv_bytes_per_token(MODEL, 4, 1, 4) * 16
    assert blocks(kv_memory=f"{page * 10} B") == 11
    assert blocks(kv_memory=f"{page * 11 - 1} B") == 11
    assert blocks(kv_memory=f"{page * 10} B", tp=2) == 21
    assert blocks(kv_memory=f"{page * 10} B", layers=range(2)) == 21


def test_no_more_pages_than_can_ever_be_used():
    assert blocks(available_bytes=100 * GIB, max_sequences=3) == 3 * 16 + 1


def test_a_share_of_what_is_free_after_the_weights():
    small = blocks(available_bytes=40 * 2**20, max_batch_tokens=16, max_sequences=10_000, kv_memory_share=0.25)
    large = blocks(available_bytes=40 * 2**20, max_batch_tokens=16, max_sequences=10_000, kv_memory_share=0.5)
    assert 1.8 < large / small < 2.2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"available_bytes": weight_bytes(MODEL, range(4), 1, 4) // 2}, "weights of 4 layers do not fit"),
        ({"kv_memory": "2 GiB"}, "more than this rank has"),
        ({"kv_memory": "100 B"}, "raise engine.kv_memory to"),
        ({"kv_memory": "64 KiB", "max_context": 200}, "lower engine.max_context to 64"),
    ],
)
def test_what_does_not_fit_is_said_with_the_nearest_choice(settings, words):
    with pytest.raises(ConfigError) as caught:
        blocks(**settings)
    assert words in str(caught.value)


def test_context_limit():
    assert context_limit(MODEL, EngineSection()) == 256
    assert context_limit(MODEL, EngineSection(max_context=100)) == 100
    with pytest.raises(ConfigError, match="set engine.max_context = 256"):
        context_limit(MODEL, EngineSection(max_context=257))


def test_available_memory_is_shared_by_the_ranks_of_a_node():
    alone, shared = available_host_bytes(1), available_host_bytes(4)
    assert 0 < shared < alone


def test_free_memory_of_cgroups_counts_cached_files_as_free(tmp_path):
    """Version 2 with a limit on the parent, and version 1 beside it."""
    root = tmp_path / "cgroup"
    v2, v1 = root / "job/step", root / "memory/slurm/job"
    for folder in (v2, v1):
        folder.mkdir(parents=True)
    (v2 / "memory.max").write_text("max\n")
    (v2.parent / "memory.max").write_text("1000\n")
    (v2.parent / "memory.current").write_text("900\n")
    (v2.parent / "memory.stat").write_text("anon 100\ninactive_file 500\nactive_file 200\n")
    (v1 / "memory.limit_in_bytes").write_text("5000\n")
    (v1 / "memory.usage_in_bytes").write_text("4000\n")
    (v1 / "memory.stat").write_text("total_inactive_file 1500\ntotal_active_file 0\n")
    (v1.parent / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (v1.parent / "memory.usage_in_bytes").write_text("1\n")
    (v1.parent / "memory.stat").write_text("")
    listing = tmp_path / "self"
    listing.write_text("5:cpu,memory:/slurm/job\n0::/job/step\n")
    assert sorted(cgroup_free_bytes(listing, root)) == [800, 2500]
