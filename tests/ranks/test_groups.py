"""Groups of a mesh, agreement and the control channel, on real ranks."""

import pytest

from tests.mpi import NCCL_STAND_IN, run_ranks


@pytest.mark.timeout(120)
@pytest.mark.parametrize("env", [{}, NCCL_STAND_IN], ids=["mpi", "nccl stand-in"])
def test_layouts_agreement_and_control_channel(env):
    result = run_ranks(4, ["-m", "tests.ranks.groups_rank"], timeout_s=90, env=env).check()
    assert "16 layouts fine" in result.stdout
