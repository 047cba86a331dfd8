"""Every communicator passes the one contract suite, at several sizes."""

import pytest

from hpcinfer.comm.local import LocalCommunicator
from tests.contract.communicator_suite import CommunicatorSuite
from tests.mpi import run_ranks


@pytest.mark.parametrize("case", CommunicatorSuite.cases())
def test_local(case):
    def make(name, *, deadline_s=1.0):
        return LocalCommunicator(name)

    CommunicatorSuite(make).run(case)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_mpi(num_ranks):
    # All cases in one world, strict and not: starting ranks costs more than running the cases.
    result = run_ranks(num_ranks, ["-m", "tests.contract.communicator_world", "mpi"], timeout_s=200).check()
    print(result.stdout)
    cases = 2 * len(CommunicatorSuite.cases())
    assert f"{num_ranks} ranks, torch threads 1" in result.stdout
    assert f"{cases} of {cases} cases passed" in result.stdout


@pytest.mark.timeout(240)
@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.full), 4])
def test_nccl_on_a_stand_in(num_ranks):
    """NcclCommunicator over a stand-in for cupy.cuda.nccl that moves the bytes at the addresses it is given."""
    result = run_ranks(num_ranks, ["-m", "tests.contract.communicator_world", "nccl"], timeout_s=200).check()
    print(result.stdout)
    cases = len(CommunicatorSuite.cases()) + 2  # and two of its own
    assert f"{cases} of {cases} cases passed" in result.stdout
