"""The scripts in slurm/ are what `hpcinfer submit` makes of the example jobs and sites."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest

from hpcinfer.cli import main as cli
from tests.conftest import ROOT

SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_it_is_what_submit_renders(path, monkeypatch, capfdbinary, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", str(tmp_path))  # a user's own site of the same name would come first
    monkeypatch.delenv("HPCINFER_SITE", raising=False)
    command = shlex.split(re.search(r"^# Rendered by: hpcinfer (.*)$", path.read_text(), re.MULTILINE).group(1))
    assert cli.main([*command, "--dry-run"]) == 0
    regenerate = f"hpcinfer {shlex.join(command)} --dry-run > slurm/{path.name}"
    assert capfdbinary.readouterr().out.decode() == path.read_text(), f"regenerate it: {regenerate}"
    subprocess.run(["bash", "-n", path], check=True, timeout=60)


def test_the_common_cases_are_there():
    assert {path.stem for path in SCRIPTS} == {"one_node", "many_nodes", "array", "cpu", "no_requeue"}
    texts = {path.stem: path.read_text() for path in SCRIPTS}
    assert "#SBATCH --nodes=1\n" in texts["one_node"] and "#SBATCH --nodes=2\n" in texts["many_nodes"]
    assert "#SBATCH --array=1-16\n" in texts["array"] and "--gpus-per-node" not in texts["cpu"]
    assert "--dependency=singleton" in texts["no_requeue"]


def test_the_page_beside_them_names_them_all():
    page = (ROOT / "slurm" / "README.md").read_text()
    for path in [*SCRIPTS, *(ROOT / "slurm" / "sites").glob("*.toml")]:
        assert path.name in page, path
