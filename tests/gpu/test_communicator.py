"""The communicator contract over NCCL, by ranks that share a GPU: slow, and right."""

from __future__ import annotations

import pytest

from tests.mpi import run_ranks

pytest.importorskip("cupy", reason="NCCL through CuPy: pip install '.[cuda13]'")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_nccl(num_ranks):
    result = run_ranks(num_ranks, ["-m", "tests.contract.communicator_world", "gpu"], timeout_s=850).check()
    print(result.stdout)
    assert "FAILED" not in result.stdout and "cases passed" in result.stdout
