"""`hpcinfer doctor` on real ranks, each of which may be started in a way of its own."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from hpcinfer.launch.start import find_mpiexec, mpiexec_vendor
from tests.mpi import ROOT, kill_tree, world_command, world_env

TWO_NODES = {"MPIR_CVAR_ODD_EVEN_CLIQUES": "1"}
"""MPICH then takes even and odd ranks of one host for two nodes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankStart:
    """How one rank is started."""

    prefix: Sequence[str | Path] = ()
    """Before its program."""
    arguments: Sequence[str | Path] = ()
    """Behind those of all."""
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Its own variables."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examined:
    """What became of an examination."""

    returncode: int
    report: dict[str, Any]
    """The JSON; {} where nothing was printed."""
    output: str
    """All that the ranks wrote."""
    wall_s: float

    def of(self, level: str) -> dict[str, dict[str, Any]]:
        """Check -> finding, of one level."""
        return {finding["check"]: finding for finding in self.report["findings"] if finding["level"] == level}

    @property
    def faults(self) -> dict[str, dict[str, Any]]:
        """The red ones, but for speeds of links: what else runs on a shared machine may make one rank slow."""
        return {check: finding for check, finding in self.of("red").items() if not check.startswith("links ")}

    @property
    def levels(self) -> dict[str, str]:
        """Check -> level."""
        return {finding["check"]: finding["level"] for finding in self.report["findings"]}


def examine_world(
    starts: Sequence[RankStart],
    arguments: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    program: Sequence[str] = ("-m", "hpcinfer"),
    timeout_s: float = 100,
) -> Examined:
    """Run `hpcinfer doctor --json` on ranks that are started one by one (MPICH's way).

    Args:
        arguments: of all ranks.
        env: variables of all ranks.
        program: what Python runs.
    """
    line = world_command(len(starts), [])
    line = line[: line.index("-n")]
    for number, start in enumerate(starts):
        line += [":"] if number else []
        line += ["-n", "1"] + [word for name, value in start.env.items() for word in ("-env", name, value)]
        line += [*start.prefix, sys.executable, *program, "doctor", "--json", *arguments, *start.arguments]
    return examine_process([str(word) for word in line], world_env(len(starts), env, find_mpiexec()), timeout_s)


def examine_process(line: Sequence[str], env: Mapping[str, str], timeout_s: float = 100) -> Examined:
    """Run a command that ends in a report."""
    began = time.monotonic()
    process = subprocess.Popen(
        list(line), env=dict(env), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, errors="replace", start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    finally:
        kill_tree(process.pid)
    reports = [text for text in stdout.splitlines() if text.startswith("{")]
    return Examined(
        returncode=process.returncode, report=json.loads(reports[-1]) if reports else {}, output=stdout + stderr,
        wall_s=time.monotonic() - began,
    )


def need_mpich() -> None:
    """Skip the test where ranks cannot be started one by one, and taken for ranks of several nodes."""
    vendor = mpiexec_vendor(find_mpiexec())
    if vendor != "MPICH":
        pytest.skip(f"only MPICH takes ranks of one host for two nodes; this is {vendor}")
