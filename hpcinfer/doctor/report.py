"""The findings as a table for people and as JSON for machines."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Sequence

from hpcinfer.doctor.finding import Finding, Level

COLOURS = {Level.GREEN: "32", Level.YELLOW: "33", Level.RED: "1;31", Level.ABSENT: "2"}
"""ANSI colours."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What an examination came to."""

    num_ranks: int
    num_nodes: int
    job: str
    """Path of the job file, "" without one."""
    seconds: float
    """How long it took."""
    findings: tuple[Finding, ...]

    @property
    def has_reds(self) -> bool:
        return any(finding.level is Level.RED for finding in self.findings)


def report_text(report: Report, *, colour: bool = False) -> str:
    """A line for each finding, and one below it for what to do. `colour`: for a terminal."""
    width = max(len(finding.check) for finding in report.findings)
    margin = max(map(len, Level)) + 2
    lines = [_head(report), ""]
    for finding in report.findings:
        level = f"{finding.level:<{margin}}"
        level = f"\033[{COLOURS[finding.level]}m{level}\033[0m" if colour else level
        lines.append(f"{level}{finding.check:<{width}}  {finding.found}")
        if finding.fix:
            lines.append(f"{'':<{margin + width}}  fix: {finding.fix}")
    return "\n".join([*lines, "", _sum(report.findings, report.seconds)])


def report_json(report: Report) -> str:
    """One object on one line."""
    findings = [{**dataclasses.asdict(finding), "level": str(finding.level)} for finding in report.findings]
    counts = _counts(report.findings)
    return json.dumps({
        "ok": not report.has_reds, "ranks": report.num_ranks, "nodes": report.num_nodes, "job": report.job,
        "seconds": round(report.seconds, 2), "counts": {str(level): counts[level] for level in Level}, "findings": findings,
    })


def _head(report: Report) -> str:
    ranks = f"{report.num_ranks} rank{'s' if report.num_ranks > 1 else ''}"
    nodes = f"{report.num_nodes} node{'s' if report.num_nodes > 1 else ''}"
    return f"hpcinfer doctor{' ' + report.job if report.job else ''}: {ranks} on {nodes}"


def _sum(findings: Sequence[Finding], seconds: float) -> str:
    counts = _counts(findings)
    worst_first = (Level.RED, Level.YELLOW, Level.GREEN, Level.ABSENT)
    return f"{', '.join(f'{counts[level]} {level}' for level in worst_first)}; {seconds:.1f} s"


def _counts(findings: Sequence[Finding]) -> collections.Counter:
    return collections.Counter(finding.level for finding in findings)
