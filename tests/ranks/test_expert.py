"""Tokens that travel to their experts, on real ranks."""

import pytest

from tests.mpi import NCCL_STAND_IN, run_ranks
from tests.unit.parallel.expert_cases import CASES


@pytest.mark.timeout(120)
@pytest.mark.parametrize("env", [{}, NCCL_STAND_IN], ids=["mpi", "nccl stand-in"])
def test_dispatch_and_combine(env):
    result = run_ranks(4, ["-m", "tests.ranks.expert_rank"], timeout_s=90, env=env).check()
    sizes = [len(case["rows"]) for case in CASES.values()]
    wanted = [6 * sum(size > rank for size in sizes) for rank in range(4)]
    assert f"{wanted} forwards fine" in result.stdout
