"""Groups and agreement of a single process, which needs no MPI."""

import subprocess
import sys

import pytest
import torch

from hpcinfer.comm.bootstrap import local_world, split
from hpcinfer.comm.host import LocalHostChannel
from hpcinfer.comm.local import LocalCommunicator
from hpcinfer.errors import CommunicationError, ConfigError
from hpcinfer.parallel.agree import agree, agree_or_raise
from hpcinfer.parallel.groups import build_groups
from hpcinfer.parallel.mesh import Mesh


def test_local_groups():
    groups = build_groups(local_world(), Mesh())
    assert isinstance(groups.axes.tp, LocalCommunicator) and isinstance(groups.control, LocalHostChannel)
    assert groups.from_previous is groups.to_next is None and not groups.tokens
    groups.warmup()
    groups.check()
    assert groups.wait_s() == 0.0
    groups.close()


def test_local_world():
    world = local_world()
    assert world.first(1) is world
    assert split(world, None, "nothing") is None
    with pytest.raises(CommunicationError, match=r"among ranks \[0, 1\]"):
        split(world, [0, 1], "two")
    with pytest.raises(CommunicationError, match="start more ranks"):
        world.first(2)
    with pytest.raises(ConfigError, match="a mesh of 2 ranks"):
        build_groups(world, Mesh.of(2))
    world.close()


def test_agree_alone():
    channel = LocalHostChannel()
    assert agree(channel, minimum={"blocks": 7}, leader={"backend": "sdpa"}) == {"blocks": 7, "backend": "sdpa"}
    assert agree_or_raise(channel, lambda: 5) == 5
    assert channel.gather(1) == channel.all_gather(1) == [1]
    with pytest.raises(ConfigError) as caught:
        agree_or_raise(channel, raise_config_error)
    assert caught.value.agreed


def raise_config_error():
    raise ConfigError("no")


def test_a_single_process_never_loads_mpi():
    code = (
        "import sys\n"
        "from hpcinfer.comm.bootstrap import local_world\n"
        "from hpcinfer.parallel.groups import build_groups\n"
        "from hpcinfer.parallel.mesh import Mesh\n"
        "import torch\n"
        "build_groups(local_world(), Mesh()).axes.tp.all_reduce(torch.ones(2)).wait()\n"
        "assert 'mpi4py' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
