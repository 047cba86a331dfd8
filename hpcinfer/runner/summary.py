"""What a run did, for the person who started it and for machines."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from hpcinfer.observe.metrics import PHASES
from hpcinfer.runner.trial import trial_lines
from hpcinfer.units import format_count, format_duration


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """A run at its end, or where it stopped."""

    complete: bool
    """Every (row, sample) is in `output`."""
    output: str
    """generations.h5 when complete, else the run directory."""
    rows: int
    """Output rows of the run: prompts times samples."""
    ok: int
    failed: int
    partial: int
    """Rows of which a part is kept for the next start."""
    missing: int
    """Rows of which nothing is kept."""
    failures: Mapping[str, int]
    """The commonest reasons of failed rows found by this start, each with its count."""
    generated_rows: int
    """Rows that this start ended itself."""
    prompt_tokens: int
    """Prompt tokens of those rows."""
    output_tokens: int
    """Tokens that this start generated."""
    seconds: float
    """Wall time of this start, loading included."""
    generation_seconds: float
    """Wall time from the first tick to the last commit."""
    phase_seconds: Mapping[str, float]
    """Seconds by phase (`observe.metrics.PHASES`), the mean over all ranks."""
    layout: str
    """Mesh and number of ranks, in words."""
    counters: Mapping[str, int]
    """What happened: ticks, preemptions, chunked prefills, resumed rows, takeovers, in all replicas together."""
    task: str = "generate"
    """What was done with each row (`task.kind`)."""
    weights_read_bytes: int = 0
    """Bytes of the checkpoint that this start got from the file system, all ranks together: each that the model needs once;
    0 where there was nothing to generate."""
    nccl: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """NCCL_* variables that were in force, and NCCL's version; empty where tensors did not travel over NCCL."""
    trial: Mapping[str, object] = dataclasses.field(default_factory=dict)
    """Of a trial: `is_done`, and what `runner.trial.estimate` says of the whole run; empty for other starts."""
    experts: Mapping[str, list[int]] = dataclasses.field(default_factory=dict)
    """Mixtures of experts: layer -> tokens that each expert got in this start; empty without mixtures."""

    @property
    def is_done(self) -> bool:
        """All that this start was asked for is committed: the whole run, or the rows of a trial."""
        return self.complete or bool(self.trial.get("is_done"))

    def to_dict(self) -> dict:
        """For JSON."""
        return dataclasses.asdict(self)


def summary_text(summary: RunSummary) -> str:
    """A few lines for the console."""
    seconds = max(summary.generation_seconds, 1e-9)
    generates = summary.task == "generate"
    tokens, kind = (summary.output_tokens, "generated") if generates else (summary.prompt_tokens, "prompt")
    lines = [
        f"{'Done' if summary.is_done else 'Stopped'} in {format_duration(summary.seconds)} on {summary.layout}.",
        f"  rows      {_rows(summary)}",
        f"  tokens    {format_count(summary.prompt_tokens)} prompt"
        + (f", {format_count(summary.output_tokens)} generated" if generates else f"; nothing is generated: task {summary.task}"),
        f"  rate      {format_count(summary.generated_rows / seconds)} rows/s, "
        f"{format_count(tokens / seconds)} {kind} tokens/s",
        f"  time      {_phases(summary)}",
    ]
    if summary.experts:
        lines.append(f"  experts   {_experts(summary.experts)}")
    for reason, count in summary.failures.items():
        lines.append(f"  failed    {format_count(count)} x {reason}")
    if summary.trial.get("is_done"):
        lines += trial_lines(summary.trial)
    lines.append(f"  output    {summary.output}")
    if summary.is_done:
        lines.append(f"  look      hpcinfer inspect {summary.output}")
    else:
        lines.append("  resume    run the same command again: it goes on from what is committed")
    return "\n".join(lines)


def expert_balance(loads: Iterable[Mapping[int, np.ndarray]]) -> dict[str, list[int]]:
    """The sum of what all ranks counted: layer (as text, for JSON) -> tokens of each expert."""
    total: dict[int, np.ndarray] = {}
    for load in loads:
        for layer, tokens in load.items():
            total[layer] = total.get(layer, 0) + tokens
    return {str(layer): total[layer].tolist() for layer in sorted(total)}


def _experts(experts: Mapping[str, list[int]]) -> str:
    """How evenly tokens were spread: the busiest expert against the mean of its layer, and those that got none."""
    busiest = {layer: max(tokens) * len(tokens) / max(sum(tokens), 1) for layer, tokens in experts.items()}
    layer = max(busiest, key=busiest.get)
    number = experts[layer].index(max(experts[layer]))
    unused = sum(tokens.count(0) for tokens in experts.values())
    return (
        f"busiest {busiest[layer]:.1f}x the mean (layer {layer}, expert {number}), mean over layers "
        f"{sum(busiest.values()) / len(busiest):.1f}x, {unused} of {sum(map(len, experts.values()))} without a token"
    )


def _rows(summary: RunSummary) -> str:
    parts = [f"{format_count(summary.rows)} in all", f"{format_count(summary.ok)} ok", f"{format_count(summary.failed)} failed"]
    if summary.partial:
        parts.append(f"{format_count(summary.partial)} partial")
    if summary.missing:
        parts.append(f"{format_count(summary.missing)} not begun")
    parts.append(f"{format_count(summary.generated_rows)} by this start")
    return ", ".join(parts)


def _phases(summary: RunSummary) -> str:
    spent = sum(summary.phase_seconds.values())
    parts = [f"{phase} {format_duration(summary.phase_seconds[phase])}" for phase in PHASES]
    return ", ".join([*parts, f"waiting {format_duration(max(0.0, summary.seconds - spent))}"]) + " (mean of ranks)"
