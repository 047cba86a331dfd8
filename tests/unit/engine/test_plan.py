"""What the ranks of a replica agree on before weights are read: attention backend, page size, number of pages.

That ranks of a real world come to one plan is in tests/parity and tests/ranks.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from hpcinfer.attention.registry import ENVIRONMENT_VARIABLE
from hpcinfer.comm.host import LocalHostChannel
from hpcinfer.config.job import EngineSection
from hpcinfer.config.model import ModelConfig
from hpcinfer.config.parallel import ParallelConfig
from hpcinfer.engine.replica_plan import ReplicaPlan, plan_replica
from hpcinfer.errors import ConfigError

MODEL = ModelConfig(
    family="LlamaForCausalLM", vocab_size=1000, hidden_size=64, intermediate_size=128, num_layers=4, num_heads=4,
    num_kv_heads=2, head_dim=16, max_position_embeddings=256, dtype="float32",
)


class Follower(LocalHostChannel):
    """The channel of a rank whose leader has values of its own."""

    def __init__(self, **leader) -> None:
        super().__init__("control")
        self.rank = 1
        self._leader = leader

    def all_gather(self, obj, *, deadline_s=None):
        minimum_names, leader_names, minimum, _ = obj
        values = {name: self._leader[name] for name in leader_names}
        least = {name: self._leader[name] for name in minimum_names}
        return [(minimum_names, leader_names, least, values), obj]


def plan(control: LocalHostChannel | None = None, **engine) -> ReplicaPlan:
    groups = SimpleNamespace(mesh=SimpleNamespace(stage=0), control=control or LocalHostChannel("control"))
    return plan_replica(
        MODEL, ParallelConfig(), EngineSection(max_sequences=4, **engine), groups, LocalHostChannel("world"), dtype="auto",
        device=torch.device("cpu"), available_bytes=2**30,
    )


@pytest.mark.parametrize(("asked", "chosen", "pages"), [(0, 16, 16), (16, 16, 16), (64, 64, 4), (5, 5, 52)])
def test_pages_are_what_the_job_asks_or_the_backend_prefers(asked, chosen, pages):
    made = plan(block_size=asked)
    assert (made.attention.name, made.limits.block_size, made.passed_over) == ("SDPA", chosen, {})
    assert made.limits.num_blocks == 4 * pages + 1


def test_the_leaders_choice_holds():
    made = plan(Follower(attention="NAIVE", block_size=32, num_blocks=9))
    assert (made.attention.name, made.limits.block_size, made.limits.num_blocks) == ("NAIVE", 32, 9)
    made = plan(Follower(attention="SDPA", block_size=64, num_blocks=1000))
    assert (made.attention.name, made.limits.block_size, made.limits.num_blocks) == ("SDPA", 64, 4 * 4 + 1)


def test_a_rank_that_cannot_follow_names_its_host_and_the_condition(monkeypatch):
    monkeypatch.setattr("platform.node", lambda: "node17")
    with pytest.raises(ConfigError) as caught:
        plan(Follower(attention="TRITON", block_size=64, num_blocks=9))
    assert "node17 cannot compute attention as the leader of its replica does, with TRITON" in caught.value.problem
    assert caught.value.found == "needs an NVIDIA GPU" and "engine.attention = 'SDPA'" in caught.value.fix


def test_the_environment_variable_is_read(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "naive")
    assert plan().attention.name == "NAIVE"
    assert plan(attention="SDPA").attention.name == "SDPA"


def test_page_sizes_that_are_none():
    with pytest.raises(ConfigError, match="engine.block_size = -1"):
        EngineSection(block_size=-1)
    assert dataclasses.asdict(EngineSection())["block_size"] == 0
