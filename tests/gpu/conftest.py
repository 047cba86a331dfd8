"""Tests that need a GPU: `pytest tests/gpu`. Without one they are skipped, with the reason."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _missing()
    for item in items:
        if "tests/gpu/" in item.nodeid:
            item.add_marker(pytest.mark.gpu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


def _missing() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a CUDA build and run `pytest tests/gpu` on a machine with a GPU"
    if not torch.cuda.is_available():
        return "no CUDA device is visible: run `pytest tests/gpu` on a machine with a GPU"
    return ""


@pytest.fixture
def device() -> torch.device:
    """The first GPU."""
    return torch.device("cuda", 0)
