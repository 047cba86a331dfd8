"""The dated result of rounds of faults: PATH.json has every round, PATH.md a table. Rounds that are run again replace their own."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path


def add(path: str, found: dict) -> None:
    """Add what one round found to PATH.json, and render PATH.md anew."""
    file = Path(f"{path}.json")
    rounds = json.loads(file.read_text())["rounds"] if file.exists() else []
    rounds = [each for each in rounds if (each["fault"], each["round"]) != (found["fault"], found["round"])] + [found]
    file.write_text(json.dumps({**_facts(), "rounds": rounds}, indent=1) + "\n")
    Path(f"{path}.md").write_text(render(json.loads(file.read_text())))


def render(result: dict) -> str:
    """The table, and what it means."""
    rounds = result["rounds"]
    faults = list(dict.fromkeys(each["fault"] for each in rounds))
    rows = [_row([each for each in rounds if each["fault"] == fault]) for fault in faults]
    return f"""\
# A task of a job array is disturbed, {result["date"]}

{result["slurm"]} with 7 nodes on one host of {result["cores"]} cores, each node with its own hostname, network, boot id and \
/dev/shm; load average of
the host, other work included: {_span(rounds, "load", ".0f")}. `hpcinfer submit --array 3` of 130 rows on slow ranks; a task has one rank \
(tp1), or two ranks on
two nodes (tp2). One fault a round, at a random moment: round 0 while the ranks start, rounds 1 to 4 each in its quarter of 10 s of
generation (a time limit comes when Slurm next looks at limits, which it does every 30 s). Written by one or several starts of

    python -m pytest tests/slurm/test_faults.py --full --slurm-faults PATH

A round has passed when every row is in the output once, with the text of an undisturbed run; a cancelled task stays away, every other one
ends as COMPLETED; and the two tasks that were left alone went on: the longest time in which one of them finished no step is under
run.heartbeat_s as it is by default, 5 s. The same figure before the fault shows what the machine itself does to it.

| fault | passed | layouts | rows done when it came | lives of the task in the run | from the fault to the last row \
| longest standstill of the others before the fault | after it |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

A task that has one life either went on (a short cut, orphaned ranks), did not come back (cancelled), or came back when all was done. Single
rounds, with their seeds and what exactly was done: the JSON file of the same name.
"""


def _row(rounds: Sequence[dict]) -> str:
    passed = [each for each in rounds if each["passed"]]
    cells = [rounds[0]["fault"], f"{len(passed)} of {len(rounds)}", ", ".join(sorted({each["layout"] for each in rounds}))]
    cells += [_span(rounds, "rows_done", ".0f"), _span(rounds, "lives", ".0f"), f"{_span(rounds, 'recovery_s', '.0f')} s"]
    cells += [f"{max(each.get(name, 0.0) for each in rounds):.2f} s" for name in ("standstill_before_s", "standstill_after_s")]
    return f"| {' | '.join(cells)} |"


def _span(rounds: Sequence[dict], name: str, form: str) -> str:
    values = [each[name] for each in rounds if name in each]  # a round that failed has not all
    if not values:
        return "-"
    least, most = format(min(values), form), format(max(values), form)
    return least if least == most else f"{least} - {most}"


def _facts() -> dict:
    slurm = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, check=False).stdout.strip()
    return {"benchmark": "slurm faults", "date": datetime.date.today().isoformat(), "slurm": slurm, "cores": os.cpu_count()}
