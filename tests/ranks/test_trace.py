"""Traces of real runs: they explain the wall time, count the operations that the layout implies, link the stages."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hpcinfer
from hpcinfer.data.prompts.prompts_writer import PromptsWriter
from hpcinfer.errors import TooManyFailedRows
from hpcinfer.observe.trace import COMPUTE, TRANSFER
from hpcinfer.observe.trace_analysis import analyse, operations_by_tick, step_ticks
from hpcinfer.observe.trace_chrome import match_flows
from hpcinfer.observe.trace_file import Trace, load_start
from tests.conftest import ROOT
from tests.mpi import rank_env
from tests.runs import JOB, LAYOUTS, run_command
from tests.unit.observe.test_trace_chrome import check

NUM_LAYERS, HIDDEN, F32 = 4, 128, 4
"""Of the demo model."""
MOST_UNEXPLAINED = 0.02


def traced(output: Path, layout: str, *settings: str) -> list[Trace]:
    command = [*run_command(output, [*LAYOUTS[layout], "parallel.two_batch=off", *settings]), "--trace"]
    result = subprocess.run(
        command, cwd=ROOT, env=rank_env(), capture_output=True, text=True, timeout=180, check=False
    )
    assert result.returncode == 0, f"{result.stdout}{result.stderr}"
    return load_start(output / "trace")


def assert_explained(traces: list[Trace]) -> None:
    """Per rank compute + exposed + idle = wall within 2 %."""
    for rank in analyse(traces).ranks:
        assert -1e-9 <= rank.other_s <= MOST_UNEXPLAINED * rank.wall_s, rank
        assert rank.segments_s > 0.1 * rank.wall_s, rank
        assert rank.steps > 10


@pytest.fixture(scope="module")
def tp2(tmp_path_factory) -> list[Trace]:
    return traced(tmp_path_factory.mktemp("tp2") / "run", "tp2")


@pytest.fixture(scope="module")
def pp2_folder(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("pp2") / "run"
    traced(output, "pp2")
    return output


def test_tp2_explains_the_wall_time(tp2):
    assert_explained(tp2)
    assert [trace.header["coordinates"]["tp"] for trace in tp2] == [0, 1]
    assert all(trace.header["complete"] and not trace.header["dropped"] for trace in tp2)


def test_tp2_has_the_operations_of_a_llama_step(tp2):
    """2L + 1 all-reduces, and one all-gather where tokens are drawn."""
    drawing = set(tp2[0]["tick"][(tp2[0]["kind"] == COMPUTE) & (tp2[0].text("name") == "sample")].tolist())
    assert drawing
    for trace in tp2:
        counts = operations_by_tick(trace, "tp")
        assert len(counts) == len(step_ticks(tp2[0])) > 10
        for tick, verbs in counts.items():
            wanted = {"all_reduce": 2 * NUM_LAYERS + 1, **({"all_gather": 1} if tick in drawing else {})}
            assert verbs == wanted, (trace.rank, tick)
    report = analyse(tp2)
    tp = next(axis for axis in report.axes if axis.axis == "tp")
    assert tp.ranks == 2 and tp.transfer_s > tp.exposed_s * 0.5 > 0
    assert {axis.axis for axis in report.axes} == {"tp", "control"}


def test_tp2_has_the_bytes_of_a_llama_step(tp2):
    one, other = (
        [r for r in trace.records() if r.kind == TRANSFER and r.track == "tp" and r.tick >= 0] for trace in tp2
    )
    assert [(r.number, r.verb, r.name, r.shape, r.dtype, r.tick) for r in sorted(one, key=_number)] == [
        (r.number, r.verb, r.name, r.shape, r.dtype, r.tick) for r in sorted(other, key=_number)
    ], "both ranks issue the same operations in the same order"
    for record in one:
        assert record.bytes == math.prod(record.shape) * F32 and record.dtype == "float32"
        if record.verb == "all_reduce":
            assert record.shape[1] == HIDDEN


def test_pp2_explains_the_wall_time_and_its_stages(pp2_folder):
    traces = load_start(pp2_folder / "trace")
    assert_explained(traces)
    report = analyse(traces)
    assert [(stage.stage, 0 <= stage.bubble < 1) for stage in report.stages] == [(0, True), (1, True)]
    assert {axis.axis for axis in report.axes} == {"pp", "tokens", "control"}
    for trace in traces:
        counts = operations_by_tick(trace, "pp")
        verb = "recv" if trace.rank else "send"
        assert all(verbs == {verb: 1} for verbs in counts.values()), "one transfer a boundary a microbatch"


def test_pp2_arrows_lead_from_stage_to_stage(pp2_folder):
    traces = load_start(pp2_folder / "trace")
    ends: dict[int, dict[str, tuple]] = {}
    flows = match_flows(traces)
    for trace in traces:
        for record in trace.records():
            flow = flows.get((trace.rank, record.track, record.verb, record.number))
            if flow is not None and record.kind == TRANSFER:
                ends.setdefault(flow, {})[record.verb] = (trace.rank, record)
    num_sends = sum(int((trace.text("verb") == "send")[trace["kind"] == TRANSFER].sum()) for trace in traces)
    assert len(ends) == num_sends > 20, "every send has its receive"
    for pair in ends.values():
        (sender, send), (receiver, receive) = pair["send"], pair["recv"]
        assert (sender, receiver) == ((0, 1) if send.track == "pp 0>1" else (1, 0))
        assert (send.shape, send.dtype, send.bytes, send.tick, send.part) == (
            receive.shape, receive.dtype, receive.bytes, receive.tick, receive.part
        )
        assert send.issued_s < receive.end_s, "on one host all ranks share a clock"


def test_no_tick_starts_before_the_tokens_it_needs(pp2_folder):
    """Tick n uses the tokens of tick n - 2: they have come before its first stage begins."""
    leader = load_start(pp2_folder / "trace")[0]
    computing = leader["kind"] == COMPUTE
    first = {
        int(tick): float(leader["start_s"][computing & (leader["tick"] == tick)].min()) for tick in step_ticks(leader)
    }
    arrived = {
        record.tick: record.end_s for record in leader.records()
        if record.kind == TRANSFER and record.track == "tokens" and record.tick >= 0
    }
    compared = [first[tick + 2] > arrived[tick] for tick in arrived if tick + 2 in first]
    assert len(compared) > 10 and all(compared)


def test_the_verb_on_a_real_run(pp2_folder):
    result = subprocess.run(
        [sys.executable, "-m", "hpcinfer", "trace", str(pp2_folder), "--json"], cwd=ROOT, env=rank_env(),
        capture_output=True, text=True, timeout=60, check=False,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    events = json.loads(Path(report["out"]).read_text())["traceEvents"]
    check(events)
    assert {event["ph"] for event in events} == {"M", "X", "s", "f"} and len(events) == report["events"]
    processes = [event["args"]["name"].split(" (")[0] for event in events if event["name"] == "process_name"]
    assert processes == ["rank 0", "rank 1"]


def test_a_failed_start_leaves_its_trace(tmp_path):
    """One prompt that cannot run is too many here; the trace ends where the start did."""
    with PromptsWriter(tmp_path / "prompts.h5", kind="text") as writer:
        for prompt in ("1+1=", "x" * 5000, "2+2="):
            writer.append(prompt)
    settings = [
        "parallel.tp=1", f"data.output={tmp_path / 'run'}", f"data.prompts={tmp_path / 'prompts.h5'}",
        f"model.path={ROOT / 'datasets/demo-model'}", "run.max_failed=0",
    ]
    with pytest.raises(TooManyFailedRows):
        hpcinfer.run(ROOT / JOB, settings)
    assert not (tmp_path / "run" / "trace").exists(), "off unless asked for"
    with pytest.raises(TooManyFailedRows):
        hpcinfer.run(ROOT / JOB, [*settings, f"data.output={tmp_path / 'again'}", "run.trace=true"])
    (trace,) = load_start(tmp_path / "again" / "trace")
    assert not trace.header["complete"] and {"load", "read", "commit"} <= set(trace.text("name"))
    assert np.isfinite(trace["start_s"]).all()


def _number(record) -> int:
    return record.number
