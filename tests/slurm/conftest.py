"""Tests on a real Slurm cluster. Without Slurm they are skipped, with the command that installs it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.slurm import cluster as slurm_cluster
from tests.slurm.jobs import FakeJobs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if reason := slurm_cluster.missing():
        for item in items:
            if "tests/slurm/" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[slurm_cluster.Cluster]:
    """Three nodes with two fake GPUs each, for the whole session; as real as this user may make them."""
    with slurm_cluster.start(3, namespaces=slurm_cluster.can_have_namespaces(), gpus=2) as running:
        yield running


@pytest.fixture
def cluster(session_cluster) -> Iterator[slurm_cluster.Cluster]:
    """The cluster; a test that fails leaves its jobs to nobody."""
    yield session_cluster
    while session_cluster.run("squeue", "--noheader").stdout.strip():
        session_cluster.run("scancel", f"--user={session_cluster.user}", check=False)
        time.sleep(0.2)


@pytest.fixture
def fakes(cluster, workplace) -> FakeJobs:
    """Jobs whose ranks only pretend."""
    return FakeJobs(cluster, workplace)


@pytest.fixture
def workplace(tmp_path) -> Path:
    """A folder to submit from, with the example jobs and the demo model in it."""
    for name in ("jobs", "datasets"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path
