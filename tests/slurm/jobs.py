"""Jobs for the tests: submitted as a user submits them, real ones and ones whose ranks only pretend."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.conftest import ROOT
from tests.slurm.cluster import Cluster

SMALL_SITE = {"slurm": {"ranks_per_node": 2, "cores_per_rank": 1}}


def toml(tables: dict[str, dict]) -> str:
    """Sections with keys; a dict among the values becomes a section below."""
    lines = []
    for section, keys in tables.items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items() if not isinstance(value, dict))]
        for key, value in keys.items():
            if isinstance(value, dict):
                lines += [f"[{section}.{key}]", *(f"{name} = {json.dumps(each)}" for name, each in value.items())]
    return "\n".join(lines) + "\n"


def site_file(folder: Path, tables: dict[str, dict]) -> Path:
    """A site file with these keys."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "site.toml"
    path.write_text(toml(tables))
    return path


def submit(cluster: Cluster, *arguments: object, cwd: Path = ROOT, check: bool = True) -> dict:
    """Run `hpcinfer submit --json` as a user on a login node."""
    result = cluster.run(sys.executable, "-m", "hpcinfer", "submit", "--json", *map(str, arguments), cwd=cwd, check=check)
    return json.loads(result.stdout) if result.returncode == 0 else {"error": result.stderr}


def submit_demo(cluster: Cluster, folder: Path, *arguments: object, site: dict = SMALL_SITE, settings: Sequence[str] = ()) -> dict:
    """Submit the demo job from `folder` into its folder "run"."""
    file = site_file(folder / "site", site)
    words = [word for setting in ["data.output=run", *settings] for word in ("--set", setting)]
    return submit(cluster, "jobs/demo.toml", "--site", file, *words, *arguments, cwd=folder)


def writer_jobs(folder: Path) -> set[str]:
    """The Slurm jobs that have taken part in the run."""
    return {json.loads(path.read_text())["job"] for path in (folder / "run" / "writers").glob("*.json")}


def logs(folder: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted(folder.glob("*.log")))


def wait_for(condition: Callable[[], bool], within_s: float = 60) -> None:
    """Return as soon as `condition` holds; fail the test when it does not in time."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"not within {within_s} s"
        time.sleep(0.1)


def wait_for_empty_queue(cluster: Cluster, folder: Path, within_s: float = 60) -> None:
    """Return when no job is left; a failure shows those that are, and the logs in `folder`."""
    end = time.monotonic() + within_s
    while left := cluster.run("squeue", "--noheader").stdout.strip():
        assert time.monotonic() < end, f"{left}\n{logs(folder)}"
        time.sleep(0.2)


class FakeJobs:
    """Submits jobs whose ranks only pretend (`fake_rank.py`), each with a plan of its lives."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        python = folder / "fake python"
        python.write_text(f'#!/bin/bash\nexport FAKE_PYTHON="$0"\nexec "{sys.executable}" "{ROOT}/tests/slurm/fake_rank.py" "$@"\n')
        python.chmod(0o755)
        self.environment = {"python": str(python)}
        self.variables: dict[str, str] = {}
        """Of the shell that submits, beside the usual ones."""

    def run(self, name: str) -> Path:
        """The run directory of a job."""
        return self.folder / f"run {name}"

    def submit(self, name: str, plan: str, *options: object, slurm: dict | None = None, **tables: dict) -> list[int]:
        """Submit a job of this name; its lives go as `plan` says. `slurm` and `tables` are sections of its site file."""
        tables = {"slurm": {"ranks_per_node": 1, **(slurm or {})}, "environment": self.environment, **tables}
        site = site_file(self.folder / f"site {name}", tables)
        variables = {"FAKE_PLAN": plan, "FAKE_RUN": str(self.run(name)), "FAKE_NAME": name, **self.variables}
        # With a lower limit of open files than there could be.
        command = ["bash", "-c", 'ulimit -Sn 1100; exec "$@"', "login", sys.executable, "-m", "hpcinfer", "submit", "jobs/demo.toml"]
        command += ["--set", f"data.output={self.run(name)}", "--set", "parallel.tp=1", "--name", name, "--time", "5", "--json"]
        command += ["--site", str(site), *map(str, options)]
        return json.loads(self.cluster.run(*command, cwd=self.folder, env=variables).stdout)["jobs"]

    def lives(self, name: str) -> int:
        path = self.run(name) / f"{name}-lives"
        return path.stat().st_size if path.exists() else 0

    def log(self, name: str) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob(f"{name}-*.log")))
