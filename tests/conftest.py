"""Shared by all tests: the seeded rotating subset of the long matrices, and settings that keep a shared machine fair."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
ROTATION_SHARE = 12
"""`make test` runs one case in this many of those marked `full`."""

# Machines are shared: a slow draw is not a failure. Derandomised, so that a red run can be repeated.
settings.register_profile("shared", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run every case of the long matrices")
    parser.addoption("--rotation", default=None, help="seed of the subset run without --full, and of faults; default: the commit")
    parser.addoption(
        "--slurm-faults", default=None, metavar="PATH", help="tests/slurm/test_faults.py writes what each round found to PATH.json and .md"
    )


def pytest_report_header(config: pytest.Config) -> str:
    if config.getoption("full"):
        return f"long matrices: all cases, rotation {rotation_of(config)!r}"
    return f"long matrices: one case in {ROTATION_SHARE}, rotation {rotation_of(config)!r} (--rotation SEED repeats it)"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("full"):
        return
    rotation = rotation_of(config)
    dropped = [item for item in items if item.get_closest_marker("full") and not _in_turn(item.nodeid, rotation)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]


@pytest.fixture(scope="session")
def rotation(pytestconfig) -> str:
    """The seed of what is drawn anew for every commit; `--rotation` repeats it."""
    return rotation_of(pytestconfig)


def _in_turn(nodeid: str, rotation: str) -> bool:
    digest = hashlib.sha256(f"{rotation} {nodeid}".encode()).digest()
    return digest[0] % ROTATION_SHARE == 0


def rotation_of(config: pytest.Config) -> str:
    """The seed of what is drawn anew for every commit; `--rotation` repeats it."""
    chosen = config.getoption("rotation") or os.environ.get("HPCINFER_TEST_ROTATION")
    if chosen:
        return chosen
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return head.stdout.strip() or "0"
