"""Groups of a mesh, agreement and the control channel, on real ranks."""

import pytest

from tests.mpi import run_ranks


@pytest.mark.timeout(120)
def test_layouts_agreement_and_control_channel():
    result = run_ranks(4, ["-m", "tests.ranks.groups_rank"], timeout_s=90).check()
    assert "16 layouts fine" in result.stdout
