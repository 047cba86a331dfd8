"""Binding ranks to devices, as far as it goes without one."""

from __future__ import annotations

import pytest
import torch

from hpcinfer.comm import device as device_module
from hpcinfer.comm.device import bind_device, shared_gpus
from hpcinfer.comm.host import LocalHostChannel
from hpcinfer.errors import ConfigError, LaunchError


class Channel(LocalHostChannel):
    """All ranks say what this one says, or what the test gives them."""

    def __init__(self, *answers) -> None:
        super().__init__("world")
        self.answers = list(answers)

    def all_gather(self, obj, *, deadline_s=None):
        return [obj, *self.answers.pop(0)] if self.answers else [obj]


@pytest.fixture
def gpus(monkeypatch):
    """Pretends that this process sees so many GPUs; returns what was bound."""
    bound = []

    class Properties:
        uuid = "GPU-1"

    def pretend(count: int, cuda: str | None = "13.0") -> list:
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", bound.append)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
        return bound

    return pretend


def test_a_gpu_setting_without_a_gpu_says_what_to_set(gpus):
    gpus(0, cuda=None)
    with pytest.raises(ConfigError) as raised:
        bind_device("cuda", Channel(), local_rank=0, host="n1")
    text = str(raised.value)
    assert torch.__version__ in text and "built without CUDA" in text and 'engine.device = "cpu"' in text and ".[cuda13]" in text
    assert raised.value.agreed
    gpus(0)
    with pytest.raises(ConfigError, match="sees no GPU on n1"):
        bind_device("cuda", Channel(), local_rank=0, host="n1")


def test_auto_takes_the_cpu_where_nobody_has_a_gpu_and_cpu_asks_nobody(gpus):
    gpus(0)
    assert bind_device("auto", Channel([("n2", 0)]), local_rank=0, host="n1").type == "cpu"
    gpus(4)
    assert bind_device("cpu", None, local_rank=0, host="n1").type == "cpu"


def test_auto_refuses_a_mixture(gpus):
    gpus(2)
    with pytest.raises(ConfigError, match="only some ranks") as raised:
        bind_device("auto", Channel([("n2", 0)]), local_rank=0, host="n1")
    assert "n2" in raised.value.found and "n1" not in raised.value.found


@pytest.mark.parametrize(("count", "local_rank", "index"), [(4, 3, 3), (1, 3, 0), (2, 3, 1), (8, 0, 0)])
def test_the_device_follows_the_local_rank(gpus, count, local_rank, index):
    """All GPUs visible to every rank, and one visible to each."""
    bound = gpus(count)
    device = bind_device("auto", Channel(), local_rank=local_rank, host="n1")
    assert device == torch.device("cuda", index) and bound == [device]


def test_two_ranks_on_one_gpu_are_named(gpus):
    gpus(1)
    others = [("n1", 1)], [("n1", "GPU-1")]
    with pytest.raises(LaunchError, match="ranks 0, 1 on host n1 have GPU GPU-1"):
        bind_device("auto", Channel(*others), local_rank=0, host="n1")
    assert bind_device("auto", Channel(*others), local_rank=0, host="n1", share_gpu=True).index == 0


def test_the_same_gpu_name_on_two_hosts_is_fine():
    assert shared_gpus([("n1", "GPU-1"), ("n2", "GPU-1"), ("n1", "GPU-2")]) is None
    problem = shared_gpus([("n1", "a"), ("n2", "a"), ("n1", "a"), ("n2", "a"), ("n2", "b")])
    assert "ranks 0, 2 on host n1" in problem.found and "ranks 1, 3 on host n2" in problem.found
    assert "--gpus-per-node" in problem.fix


def test_nothing_but_the_binding_touches_cuda():
    assert device_module.CPU == torch.device("cpu")
