"""compute-sanitizer's memory checker over the kernels of this package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not on the PATH: it comes with the CUDA toolkit")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("suite", "cases"),
    [("tests/gpu/test_kernels.py", "not graph and not capture"), ("tests/gpu/test_attention.py", "TRITON and not graph and not capture")],
)
def test_no_access_outside_allocations(suite, cases):
    """Of our own kernels. Caching is off, so that every tensor is an allocation of its own."""
    result = subprocess.run(
        [SANITIZER, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-x", suite, "-k", cases],
        cwd=ROOT, capture_output=True, text=True, timeout=850, check=False,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
