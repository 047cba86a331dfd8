"""What the README says: its commands run, its links and tests exist, and it stays short."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.mpi import rank_env

README = (ROOT / "README.md").read_text()


def test_it_is_short():
    assert len(README.splitlines()) < 200


def test_its_commands_run():
    """In order, as a user would type them."""
    (ROOT / "runs").mkdir(exist_ok=True)
    subprocess.run(["rm", "-rf", "runs/readme"], cwd=ROOT, check=True)
    env = rank_env()
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    commands = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
    assert len(commands) >= 5
    for command in commands:
        result = subprocess.run(shlex.split(command), cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"


def test_its_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"make ([a-z-]+)", README))
    assert targets >= {"demo", "test", "test-full"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_its_links_and_proofs_exist():
    for name in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / name).exists(), name
    table = [line.split("|")[2] for line in README.splitlines() if line.startswith("| ") and "`" in line]
    assert len(table) > 10
    for cell in table:
        folder = ROOT
        for name in re.findall(r"`([^`]+)`", cell):
            if name.startswith("hpcinfer bench"):
                continue
            path = ROOT / name if "/" in name else folder / name
            assert path.exists(), name
            folder = path.parent


def test_every_job_file_is_valid():
    from hpcinfer.config.load import load_job

    jobs = list((ROOT / "jobs").glob("*.toml"))
    assert jobs
    for job in jobs:
        load_job(job)
