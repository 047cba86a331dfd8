#!/usr/bin/env python3
"""Stands in for `python -m hpcinfer run ...` where a test is about the batch script: what a life does is read from FAKE_PLAN.

A plan is a list of words, one for each life of the job, separated by commas:
    commit / nothing      a segment is committed first, or not
    3, 1, 0               it then ends with this code at once
    late                  as the first word of the plan: in its first life it takes some seconds before it can be signalled
    drain                 it waits for SIGUSR1 or SIGTERM and ends with 3
    kill                  it kills itself
    done                  it writes the marker of a complete run and ends with 0
joined by a plus sign: "commit+drain,done". The last word counts for all later lives.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

from hpcinfer.data.ledger.run_directory import RunIdentity, create_or_open
from hpcinfer.data.ledger.writers import WriterIdentity, register_writer
from hpcinfer.launch.site import apply_site


def main() -> int:
    stopped = []
    if os.environ["FAKE_PLAN"].startswith("late") and "SLURM_RESTART_COUNT" not in os.environ:
        time.sleep(4)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stopped.append(signal.Signals(number).name))
    apply_site("", os.environ)  # as `hpcinfer run` does
    run = create_or_open(os.environ["FAKE_RUN"], RunIdentity(input_fingerprint="x", num_rows=1, model={}, sampling={}))
    first = os.environ["SLURM_PROCID"] == "0"
    lives = run.path / f"{os.environ['FAKE_NAME']}-lives"
    life = lives.stat().st_size if lives.exists() else 0
    record(run.path / f"rank-{os.environ['SLURM_JOB_ID']}-{life}-{os.environ['SLURM_PROCID']}.json")
    if first:
        with open(lives, "a") as file:
            file.write("x")
    words = os.environ["FAKE_PLAN"].split(",")
    actions = words[min(life, len(words) - 1)].split("+")
    if "commit" in actions and first:
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        writer = register_writer(run, WriterIdentity(job=os.environ["SLURM_JOB_ID"], restart_count=restarts))
        (run.segments / f"seg-{writer.id}-000000.h5").write_text("rows")
    if "done" in actions:
        (run.path / "done.json").write_text(json.dumps({"num_rows": 1, "by": os.environ["SLURM_JOB_ID"]}))
    if "kill" in actions:
        os.kill(os.getpid(), signal.SIGKILL)
    if "drain" in actions:
        while not stopped:
            time.sleep(0.02)
        print("fake rank stopped by", stopped[0], flush=True)
        return 3
    return next((int(action) for action in actions if action.isdigit()), 0)


def record(path: Path) -> None:
    """What this rank was given."""
    facts = {
        "argv": sys.argv, "env": dict(os.environ), "python": os.environ["FAKE_PYTHON"],
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
    }  # fmt: skip
    path.write_text(json.dumps(facts))


if __name__ == "__main__":
    sys.exit(main())
