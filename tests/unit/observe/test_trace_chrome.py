"""The JSON file for trace viewers: valid, ordered, and every arrow with two ends."""

from __future__ import annotations

import collections
import json
import subprocess
import sys

import pytest

from hpcinfer.cli.main import main
from hpcinfer.observe.trace import IDLE
from hpcinfer.observe.trace_chrome import match_flows, write_chrome
from tests.conftest import ROOT
from tests.unit.observe.trace_makers import make_trace, segment, transfer, wait

LINKS = {"pp 0>1": [0, 1], "tp": [0, 1]}


def check(events: list[dict]) -> None:
    """What viewers need of a list of events; fails otherwise."""
    last = collections.defaultdict(lambda: -1.0)
    slices = collections.defaultdict(list)
    for event in events:
        assert {"ph", "pid", "tid", "ts", "name"} <= event.keys(), event
        if event["ph"] == "M":
            continue
        track = (event["pid"], event["tid"])
        assert event["ts"] >= last[track], f"time runs backwards on {track}: {event}"
        last[track] = event["ts"]
        if event["ph"] == "X":
            assert event["dur"] > 0
            slices[track].append((event["ts"], event["ts"] + event["dur"]))
    ends = collections.defaultdict(list)
    for event in events:
        if event["ph"] in "sf":
            ends[event["id"]].append(event["ph"])
            inside = [s for s in slices[event["pid"], event["tid"]] if s[0] <= event["ts"] <= s[1] + 1e-9]
            assert inside, f"an arrow that hangs in the air: {event}"
    assert all(sorted(pair) == ["f", "s"] for pair in ends.values()), ends
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert set(slices) <= named


def pipeline(folder, **header):
    """Two stages, two microbatches; the second rank posts both receives early."""
    sends = [
        transfer(110 + 5 * k, 112 + 5 * k, track="pp 0>1", verb="send", peer=1, number=3 + k, tick=k) for k in (0, 1)
    ]
    # In the order of their end the receives are swapped: the order of issue counts.
    receives = [transfer(101 + k, 120 - k, track="pp 0>1", verb="recv", peer=0, number=3 + k, tick=k) for k in (0, 1)]
    busy = [segment(100, 110), *sends, segment(110, 115, tick=1)]
    first = make_trace(folder, busy, rank=0, communicators=LINKS, **header)
    second = make_trace(
        folder,
        [*receives, wait(100, 119, track="pp 0>1"), segment(120, 130), wait(130, 180, track="control", kind=IDLE)],
        rank=1, communicators=LINKS, **header,
    )
    return [first, second]


def events_of(path) -> list[dict]:
    return json.loads(path.read_text())["traceEvents"]


def test_each_send_leads_to_its_receive(tmp_path):
    traces = pipeline(tmp_path)
    assert match_flows(traces) == {
        (0, "pp 0>1", "send", 3): 1, (1, "pp 0>1", "recv", 3): 1,
        (0, "pp 0>1", "send", 4): 2, (1, "pp 0>1", "recv", 4): 2,
    }
    count = write_chrome(tmp_path / "t.json", traces)
    events = events_of(tmp_path / "t.json")
    check(events)
    assert count == len(events)
    arrows = sorted((e["id"], e["ph"], e["pid"], e["ts"]) for e in events if e["ph"] in "sf")
    assert [(a[0], a[1], a[2]) for a in arrows] == [(1, "f", 1), (1, "s", 0), (2, "f", 1), (2, "s", 0)]
    assert arrows[1][3] == 10e6 and arrows[0][3] == pytest.approx(20e6, abs=0.01)
    names = {e["args"]["name"] for e in events if e["name"] == "thread_name" and e["pid"] == 1}
    assert names == {"compute", "waiting", "pp 0>1", "pp 0>1 (2)"}, "receives that overlap lie on two tracks"


def test_an_end_without_the_other_has_no_arrow(tmp_path):
    traces = pipeline(tmp_path)
    write_chrome(tmp_path / "t.json", traces[:1])
    assert not [e for e in events_of(tmp_path / "t.json") if e["ph"] in "sf"]
    late = transfer(101, 119, track="pp 0>1", verb="recv", peer=0, number=4)
    lost = make_trace(tmp_path, [late], rank=1, communicators=LINKS)
    lost.header["dropped"] = True
    assert set(match_flows([traces[0], lost])) == {(0, "pp 0>1", "send", 4), (1, "pp 0>1", "recv", 4)}


def test_links_of_the_same_name_in_other_replicas_are_others(tmp_path):
    traces = pipeline(tmp_path)
    for trace, rank in zip(pipeline(tmp_path), (2, 3), strict=True):
        trace.header["rank"] = rank
        trace.header["communicators"] = {"pp 0>1": [2, 3]}
        traces.append(trace)
    flows = match_flows(traces)
    assert len(flows) == 8 and len(set(flows.values())) == 4
    assert flows[0, "pp 0>1", "send", 3] == flows[1, "pp 0>1", "recv", 3] != flows[2, "pp 0>1", "send", 3]


def test_only_the_last_ticks(tmp_path):
    traces = [
        make_trace(tmp_path, [segment(100 + 10 * t, 105 + 10 * t, tick=t) for t in range(5)] + [wait(95, 146)], rank=0)
    ]
    write_chrome(tmp_path / "t.json", traces, last_ticks=2)
    events = events_of(tmp_path / "t.json")
    check(events)
    assert [e["args"]["tick"] for e in events if e["ph"] == "X" and e["cat"] == "compute"] == [3, 4]
    waits = [(e["ts"], e["dur"]) for e in events if e["ph"] == "X" and e["cat"] == "wait"]
    assert waits == [(0, 16e6)], "cut where the view begins"


def test_the_check_sees_broken_files(tmp_path):
    write_chrome(tmp_path / "t.json", pipeline(tmp_path))
    events = events_of(tmp_path / "t.json")
    for broken in (
        [e for e in events if e["ph"] != "f"], events[::-1], [e for e in events if e.get("cat") != "transfer"],
        [e for e in events if e["name"] != "thread_name"],
    ):
        with pytest.raises(AssertionError):
            check(broken)


def test_the_verb_prints_a_table_and_needs_no_torch(tmp_path):
    pipeline(tmp_path / "trace")
    code = (
        "import sys\nfor name in ('torch', 'mpi4py'): sys.modules[name] = None\n"
        "from hpcinfer.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "trace", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert any(line.split()[:3] == ["0", "0", "100.000"] for line in lines), result.stdout
    assert any(line.split()[:3] == ["pp", "2", "1.00"] for line in lines), result.stdout
    check(events_of(tmp_path / "trace" / "20260101T000000.json"))


def test_the_verb_as_json_and_its_errors(tmp_path, capsys):
    pipeline(tmp_path / "trace")
    assert main(["trace", str(tmp_path), "--json", "--out", str(tmp_path / "t.json"), "--last", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ranks"][1]["exposed_s"] == 19 and report["stages"][0]["stage"] == 0
    assert report["events"] == len(events_of(tmp_path / "t.json"))
    assert main(["trace", str(tmp_path / "absent")]) == 1
    assert "--trace" in capsys.readouterr().err
    assert main(["trace", str(tmp_path), "--last", "-1"]) == 2
