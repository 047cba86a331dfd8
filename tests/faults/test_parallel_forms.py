"""Every parallel form loses a rank in the middle of its work: who notices says so, all end, another layout goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from hpcinfer.data.generations import GenerationFile
from hpcinfer.data.ledger.status import read_status
from hpcinfer.data.prompts.prompts_writer import PromptsWriter
from hpcinfer.errors import RunDirectoryError
from tests.checkpoints import make_checkpoint
from tests.conftest import ROOT
from tests.faults.form_rank import PLANTED
from tests.mpi import kill_tree, rank_env, ranks_below, world_command, world_env
from tests.runs import JOB, assert_same, read_outputs, run_demo, wait_until_gone

SAMPLINGS = {
    "greedy": ["sampling.temperature=0.0"],
    "sampled": ["sampling.temperature=0.8", "sampling.n=2", "sampling.seed=11"],
}
DEADLINE_S = 3.0
RETRY_S = 2.0
"""Followers grant a silent leader the deadline and, for a storage that refuses, this."""
LATE_S = 6.0
"""From a deadline to the end of the last process: the reports' way out, the abort, and other work on this machine."""
# Small commits and little in work at once, so that a fault finds rows committed, in memory and not begun.
SLOW = [
    f"comm.deadline_s={DEADLINE_S:g}", f"run.retry_s={RETRY_S:g}", "run.segment_s=0.1", "run.heartbeat_s=0.5",
    "engine.max_sequences=6",
]
ROWS_BEFORE = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """A layout under test."""

    model: str
    num_ranks: int
    settings: Sequence[str]
    axes: frozenset[str]
    """Names of the communicators on which a rank may be missed."""
    counters: Sequence[str]
    """Of the scheduler, above zero where the form was at work."""


SP = "parallel.sp_min_tokens=10"
FORMS = {
    "tp2, two-batch": Form(
        model="dense", num_ranks=2, settings=["parallel.tp=2", "parallel.two_batch=2"],
        axes=frozenset({"tp", "control"}), counters=["divided_steps"],
    ),
    "pp2, 3 microbatches": Form(
        model="dense", num_ranks=2, settings=["parallel.tp=1", "parallel.pp=2", "parallel.microbatches=3"],
        axes=frozenset({"pp 0>1", "tokens", "control"}), counters=["microbatches"],
    ),
    "tp2, sequence form": Form(
        model="dense", num_ranks=2, settings=["parallel.tp=2", "parallel.sequence_form=true"],
        axes=frozenset({"tp", "control"}), counters=["microbatches"],
    ),
    "sp2": Form(
        model="dense", num_ranks=2, settings=["parallel.tp=1", "parallel.sp=2", SP],
        axes=frozenset({"sp", "tokens 1", "control"}), counters=["shared_prefills"],
    ),
    "sp2 x tp2, ep4": Form(
        model="moe", num_ranks=4, settings=["parallel.tp=2", "parallel.sp=2", "parallel.ep=4", SP],
        axes=frozenset({"tp", "sp", "ep", "tokens 1", "control"}), counters=["shared_prefills", "chunked_prefills"],
    ),
    "pp2 x sp2, ep2, two-batch": Form(
        model="moe", num_ranks=4,
        settings=["parallel.tp=1", "parallel.pp=2", "parallel.sp=2", "parallel.ep=2", "parallel.two_batch=2", SP],
        axes=frozenset({"sp", "ep", "pp 0>1", "tokens 0", "tokens 1", "control"}),
        counters=["shared_prefills", "divided_steps"],
    ),
}
FAULTS = {"stop": "greedy", "stop the leader": "sampled", "kill": "sampled", "raise": "greedy"}
"""Fault -> how its run samples."""
STANDING = {("sp2", "stop the leader"), ("pp2 x sp2, ep2, two-batch", "stop")}
KILLED = {"sp2 x tp2, ep4", "tp2, sequence form"}
"""Of the forms those that are killed here; test_kills has the others."""

MISSED = re.compile(
    r"hpcinfer: error on rank (?P<rank>\d+) of (?P<size>\d+) on host (?P<host>\S+)\n"
    r"LostPeerError: (?P<verb>\w+) on communicator '(?P<axis>[^']+)' did not finish within its deadline of "
    r"(?P<deadline>[\d.]+) s\n"
    r"  found: waited (?P<waited>[\d.]+) s for (?P=verb)(?: \([^)]+\))? of (?P<bytes>\d+) bytes by rank \d+ of \d+ in "
    r"'(?P=axis)' \(world rank (?P=rank), host (?P=host)\), "
    r"(?:peer \d+ \(world rank (?P<peer>\d+)\)|all ranks \(world ranks (?P<all>[\d, ]+)\)), "
    r"(?:microbatch )?tick (?P<tick>\d+)(?: part (?P<part>\d+))?; .*\n"
    r"  fix:   .+"
)


def cases():
    for form in FORMS:
        for fault in FAULTS:
            if fault != "kill" or form in KILLED:
                yield pytest.param(form, fault, marks=() if (form, fault) in STANDING else pytest.mark.full)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """model -> settings of a small job for it, made when it is first asked for."""
    made = {}

    def get(model: str) -> list[str]:
        if model not in made:
            made[model] = {"dense": dense_job, "moe": moe_job}[model](tmp_path_factory.mktemp(model))
        return made[model]

    return get


def dense_job(folder: Path) -> list[str]:
    rng = random.Random(5)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(3, 12))) for _ in range(240)]
    with PromptsWriter(folder / "prompts.h5", kind="text") as writer:
        for word in words:
            writer.append(f"reverse {word}:")
    return [f"data.prompts={folder / 'prompts.h5'}"]


def moe_job(folder: Path) -> list[str]:
    # Random weights this large keep the logits far apart, so that all layouts choose the same tokens.
    make_checkpoint(folder / "model", "mixtral", vocab_size=263, hidden_size=32, tokenizer=True)
    rng = np.random.default_rng(5)
    with PromptsWriter(folder / "prompts.h5", kind="token_ids") as writer:
        for row in range(160):
            length = rng.integers(70, 100) if row % 16 == 3 else rng.integers(2, 24)
            writer.append(rng.integers(3, 263, length).astype(np.int32))
    return [
        f"model.path={folder / 'model'}", f"data.prompts={folder / 'prompts.h5'}", "sampling.max_tokens=16",
        "engine.max_batch_tokens=48",
    ]


@pytest.fixture(scope="module")
def undisturbed(jobs, tmp_path_factory):
    """(model, sampling) -> outputs of a run on one rank that nothing happened to."""
    made = {}

    def get(model: str, sampling: str):
        if (model, sampling) not in made:
            output = tmp_path_factory.mktemp("undisturbed") / "run"
            run_demo(output, [*jobs(model), *SAMPLINGS[sampling], "parallel.tp=1"])
            made[model, sampling] = read_outputs(output)
        return made[model, sampling]

    return get


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("name", "fault"), list(cases()))
def test_a_fault_is_reported_and_another_layout_goes_on(name, fault, tmp_path, jobs, undisturbed):
    form, sampling, rng = FORMS[name], FAULTS[fault], random.Random(f"{name} {fault}")
    job = [*jobs(form.model), *SAMPLINGS[sampling]]
    expected = undisturbed(form.model, sampling)
    victim = 0 if fault == "stop the leader" else rng.randrange(1, form.num_ranks)
    output, trigger = tmp_path / "run", tmp_path / "trigger"
    process = start(form, [*job, *form.settings, *SLOW], output, tmp_path / "log", victim, trigger)
    try:
        ranks = wait_for_rows(process, form, output, tmp_path / "log")
        time.sleep(rng.uniform(0.0, 0.2))
        began = time.monotonic()
        set_off(fault, ranks[victim], trigger)
        limit_s = {"stop": DEADLINE_S, "stop the leader": DEADLINE_S + RETRY_S}.get(fault, 0.0) + LATE_S
        code = process.wait(timeout=60)
        left = wait_until_gone(list(ranks.values()), 2)
        ended_s = time.monotonic() - began
    finally:
        kill_tree(process.pid)
        process.wait()
    text = (tmp_path / "log").read_text(errors="replace")
    assert code != 0, text
    assert not left, f"ranks with the pids {left} live on"
    assert ended_s < limit_s, f"ended after {ended_s:.1f} s\n{text}"
    check_report(form, fault, victim, text)
    assert_nothing_twice(output)
    before = read_status(output, exact=True).num_done
    assert 0 < before < len(expected), "the fault came too late"
    other, counters = resume(name, job, output)
    assert_same(read_outputs(output), expected)
    for counter in FORMS[other].counters:
        assert counters[counter] > 0, f"{counter} in {other}"


def start(
    form: Form, settings: Sequence[str], output: Path, log: Path, victim: int, trigger: Path
) -> subprocess.Popen:
    """The job in ranks that can be told to fail, in a session of its own."""
    argv = ["-m", "tests.faults.form_rank", str(victim), str(trigger), "run", JOB, "--set", f"data.output={output}"]
    argv += [word for setting in settings for word in ("--set", setting)]
    command = world_command(form.num_ranks, argv)
    with open(log, "wb") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=world_env(form.num_ranks, None, command[0]), stdin=subprocess.DEVNULL, stdout=file,
            stderr=file, start_new_session=True,
        )


def wait_for_rows(process: subprocess.Popen, form: Form, output: Path, log: Path) -> dict[int, int]:
    """Wait until some rows are committed; return rank -> pid."""
    until = time.monotonic() + 100
    while True:
        assert process.poll() is None, f"ended before the fault\n{log.read_text(errors='replace')}"
        assert time.monotonic() < until, f"no rows\n{log.read_text(errors='replace')}"
        try:
            if read_status(output, exact=True).num_done >= ROWS_BEFORE:
                break
        except RunDirectoryError:
            pass
        time.sleep(0.05)
    ranks = ranks_below(process.pid)
    assert sorted(ranks) == list(range(form.num_ranks))
    return ranks


def set_off(fault: str, pid: int, trigger: Path) -> None:
    if fault == "raise":
        trigger.touch()
    else:
        os.kill(pid, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)


def check_report(form: Form, fault: str, victim: int, text: str) -> None:
    heads = re.findall(r"^hpcinfer: error on rank (\d+) of (\d+) on host (\S+)$", text, re.MULTILINE)
    host = os.uname().nodename
    if fault == "raise":
        assert heads == [(str(victim), str(form.num_ranks), host)], text
        assert f"RuntimeError: {PLANTED}" in text and "Traceback" in text
        return
    if fault == "kill":  # nobody may have had the time to miss it: the launcher says what it saw
        assert re.search(r"KILLED BY SIGNAL: 9|EXIT CODE: 9", text), text
        return
    reports = [match.groupdict() for match in MISSED.finditer(text)]
    assert len(reports) == len(heads) > 0, text
    missing = set()
    for report in reports:
        assert report["rank"] != str(victim) and report["host"] == host, text
        assert report["axis"] in form.axes, text
        deadline_s = float(report["deadline"])
        waits_for_leader = report["axis"] == "control" and report["peer"] == "0"
        assert deadline_s == DEADLINE_S + RETRY_S * waits_for_leader, text
        assert deadline_s <= float(report["waited"]) < deadline_s + 2 and int(report["bytes"]) > 0, text
        assert int(report["tick"]) > 0
        assert (report["part"] is not None) == (report["axis"].split()[0] in ("tp", "sp", "ep", "pp")), text
        missing |= {int(rank) for rank in (report["peer"] or report["all"]).split(",")} - {int(report["rank"])}
    assert victim in missing, text


def assert_nothing_twice(output: Path) -> None:
    keys = []
    for path in sorted((output / "segments").glob("seg-*.h5")):
        with GenerationFile(path) as file:
            keys += [generation.key for generation in file]
    assert len(keys) == len(set(keys)), "a row is committed twice by one life"


def resume(name: str, job: Sequence[str], output: Path) -> tuple[str, dict]:
    """Run to the end in the next form of the same model; return its name and the scheduler's counters."""
    names = [other for other in FORMS if FORMS[other].model == FORMS[name].model]
    other = names[(names.index(name) + 1) % len(names)]
    command = [sys.executable, "-m", "hpcinfer", "run", JOB, "--json"]
    for setting in [f"data.output={output}", *job, *FORMS[other].settings]:
        command += ["--set", setting]
    result = subprocess.run(
        command, cwd=ROOT, env=rank_env(), capture_output=True, text=True, timeout=150, check=False,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, f"{other}: {result.stdout}{result.stderr}"
    summary = json.loads(result.stdout)
    assert summary["complete"] and summary["failed"] == summary["missing"] == 0, summary
    return other, summary["counters"]
