"""What a trial says about the whole run: rates, and the time that all rows would take in the same layout."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hpcinfer.units import counted, format_count, format_duration, format_rate

_SURE = 2.0
"""Standard errors on either side: about 95 % of the cases."""


@dataclasses.dataclass(slots=True)
class RowStatistics:
    """Of the rows that one replica ended. Sums and sums of squares: those of several replicas add up."""

    ok: int = 0
    prompt_tokens: int = 0
    prompt_squares: int = 0
    output_tokens: int = 0
    """Tokens of the whole rows, those that an earlier life generated included."""
    output_squares: int = 0
    full_rows: int = 0
    """Rows that ended while more were waiting to begin, without those of the first steps, before any row had ended."""
    full_s: float = 0.0
    """How long that was."""
    seconds: float = 0.0
    """From the first step to the last row that ended."""

    def add(self, prompt_tokens: int, output_tokens: int) -> None:
        """Count an ok row."""
        self.ok += 1
        self.prompt_tokens += prompt_tokens
        self.prompt_squares += prompt_tokens**2
        self.output_tokens += output_tokens
        self.output_squares += output_tokens**2


def estimate(
    replicas: Sequence[RowStatistics],
    *,
    num_rows: int,
    num_trial: int,
    ended: int,
    output_tokens: int,
    start_up_s: float,
    max_sequences: int,
    num_ranks: int,
    device: str,
    is_drawn: bool,
) -> dict[str, Any]:
    """What the whole run would take in this layout, as plain values for JSON.

    The rate is that of the time in which more rows were waiting than the batch holds, where at least one batch of rows ended in it; else
    that of the whole trial, in which the batch was filling up or running empty, so that the whole run will be faster. The range is
    two standard errors of the mean number of tokens a row (of prompts or outputs, the larger one), which holds for rows that are drawn.

    Args:
        replicas: of this start.
        num_rows: output rows of the whole run.
        num_trial: output rows of the trial.
        ended: output rows that this start ended, failed ones included.
        output_tokens: tokens that this start generated.
        start_up_s: what a start takes beside generating.
        max_sequences: rows in work at once in a replica.
        num_ranks: of this start.
        device: cpu or cuda.
        is_drawn: the rows were drawn from all over the input.

    Returns:
        rows, rows_in_all, rows_per_s, output_tokens_per_s, prompt_tokens and output_tokens (means of ok rows), is_full (see above),
        is_drawn, max_sequences, start_up_s; seconds, and seconds_low and seconds_high; ranks, device and rank_hours, for all rows. Without
        a row ended by this start there are rows, rows_in_all and rows_ended alone.
    """
    facts: dict[str, Any] = {"rows": num_trial, "rows_in_all": num_rows, "rows_ended": ended}
    if not ended:
        return facts
    total = RowStatistics(*(sum(getattr(r, field.name) for r in replicas) for field in dataclasses.fields(RowStatistics)))
    seconds = max(replica.seconds for replica in replicas)
    busy = [replica for replica in replicas if replica.ok or replica.full_rows]
    is_full = all(replica.full_rows >= max_sequences for replica in busy) and bool(busy)
    rate = sum(replica.full_rows / replica.full_s for replica in busy) if is_full else ended / seconds
    token_rate = rate * total.output_tokens / total.ok if is_full and total.ok else output_tokens / seconds
    seconds = num_rows / rate
    error = _SURE * max(
        _relative_error(total.ok, total.prompt_tokens, total.prompt_squares),
        _relative_error(total.ok, total.output_tokens, total.output_squares),
    ) * math.sqrt(max(0.0, 1 - ended / num_rows))  # nothing is uncertain about rows that were run
    return {
        **facts,
        "rows_per_s": rate,
        "output_tokens_per_s": token_rate,
        "prompt_tokens": total.prompt_tokens / max(total.ok, 1),
        "output_tokens": total.output_tokens / max(total.ok, 1),
        "is_full": is_full,
        "is_drawn": is_drawn,
        "max_sequences": max_sequences,
        "start_up_s": start_up_s,
        "seconds": seconds,
        "seconds_low": seconds * max(0.0, 1 - error),
        "seconds_high": seconds * (1 + error),
        "ranks": num_ranks,
        "device": device,
        "rank_hours": num_ranks * seconds / 3600,
    }


def trial_lines(trial: Mapping[str, Any]) -> list[str]:
    """For the console."""
    count, total = format_count(trial["rows"]), format_count(trial["rows_in_all"])
    if not trial["rows_ended"]:
        return [f"  trial     {count} of {total} rows, all of them done before: there is nothing to measure"]
    unit = "GPU-hours" if trial["device"] == "cuda" else "CPU-hours"
    low, high = trial["seconds_low"], trial["seconds_high"]
    lines = [
        f"  trial     {count} of {total} rows: {format_rate(trial['rows_per_s'])} rows/s, "
        f"{format_rate(trial['output_tokens_per_s'])} generated tokens/s; a row has {format_count(trial['prompt_tokens'])} prompt tokens "
        f"and {format_count(trial['output_tokens'])} generated ones",
        f"  estimate  {format_duration(trial['seconds'])} ({format_duration(low)} to {format_duration(high)}) for all {total} rows in this "
        f"layout: {_hours(trial['rank_hours'])} {unit} on {counted(trial['ranks'], 'rank')}; and {format_duration(trial['start_up_s'])} "
        "at each start",
    ]
    if not trial["is_full"]:
        lines.append(
            f"  note      too few rows to keep the batch full ({format_count(trial['max_sequences'])} at once in a replica): the whole run "
            "will be faster than that; a larger --limit says how much"
        )
    if not trial["is_drawn"]:
        lines.append("  note      the rows are not drawn from the whole input: others may be longer or shorter (--limit draws them)")
    return lines


def _relative_error(count: int, total: int, squares: int) -> float:
    """The standard error of a mean, divided by the mean."""
    if count < 2 or not total:
        return 0.0
    mean = total / count
    variance = max(0.0, squares / count - mean**2) * count / (count - 1)
    return math.sqrt(variance / count) / mean


def _hours(hours: float) -> str:
    return format_rate(hours) if hours < 100 else format_count(hours)
