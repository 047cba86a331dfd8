"""Who takes the Triton kernels, and that nobody else needs Triton."""

from __future__ import annotations

import subprocess
import sys

import torch

from hpcinfer.kernels.select import uses_triton
from tests.conftest import ROOT
from tests.unit.structure.test_imports import FILES, imports


def test_tensors_of_a_cpu_do_not():
    assert not uses_triton(torch.zeros(2))


def test_only_files_of_kernels_import_triton():
    """They are imported inside functions, when a tensor on a GPU comes."""
    users = {path.relative_to(ROOT / "hpcinfer") for path in FILES if any(name.split(".")[0] == "triton" for name in imports(path))}
    names = {str(path) for path in users}
    assert len(names) >= 8 and all(name.rpartition("/")[2].startswith("triton_") or name.startswith("attention/") for name in names)


def test_a_model_runs_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from tests.unit.kernels.models import MODELS, stage, step\n"
        "import dataclasses\n"
        "small = {'vocab_size': 50, 'hidden_size': 64, 'expert_size': 32}\n"
        "model = stage(dataclasses.replace(MODELS['gpt-oss-20b'], **small), dtype=torch.float32, device=torch.device('cpu'))\n"
        "print(tuple(step(model, [3, 1]).shape))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0 and result.stdout.strip() == "(2, 50)", result.stderr
