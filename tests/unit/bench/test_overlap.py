"""`bench overlap`: its figures and the counters of what it switches on; the rate of its link; nothing left behind."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest

from hpcinfer.bench import link as links
from hpcinfer.bench.overlap import Tick, steady
from hpcinfer.bench.overlap_cases import OverlapOptions, scenarios
from hpcinfer.bench.overlap_report import report, table
from hpcinfer.cli import bench
from hpcinfer.errors import LaunchError, UsageError
from tests.conftest import ROOT
from tests.mpi import alive, descendants, kill_tree, rank_env

TINY = [
    "--hidden", "64", "--layers", "2", "--prefill", "24", "--sequences", "8", "--output-tokens", "8", "--prompts", "3",
    "--microbatches", "1,2",
]


def overlap_command(*options):
    return [sys.executable, "-m", "hpcinfer", "bench", "overlap", *options]


def run_overlap(*options) -> tuple[dict, str]:
    result = subprocess.run(
        overlap_command(*options), cwd=ROOT, env=rank_env(), capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stdout


def need_namespaces():
    try:
        with links.rate_limited_link(1e9):
            pass
    except LaunchError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.found}")


def test_defaults_of_the_command_line_are_those_of_the_options():
    parser = argparse.ArgumentParser()
    bench.configure(parser)
    given = vars(parser.parse_args(["overlap"]))
    assert given.pop("benchmark") == "overlap" and given.pop("link_used") == ""
    assert given == dataclasses.asdict(OverlapOptions())


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden": 3}, {"prefill": "512,"}, {"microbatches": "0"}, {"microbatches": "2,4"}, {"layouts": "tp,sp"},
        {"rate_gbit": 0.0}, {"repeats": 0},
    ],
)
def test_mistakes_are_named(wrong):
    with pytest.raises(UsageError, match="--"):
        OverlapOptions(**wrong)


def test_figures_over_loopback(tmp_path):
    out = tmp_path / "figures.json"
    figures, text = run_overlap(*TINY, "--repeats", "2", "--link", "loopback", "--out", str(out))
    assert json.loads(out.read_text()) == figures
    assert figures["link_used"] == "loopback: asked for" and "link: loopback: asked for" in text
    assert figures["link_measured"]["bytes_per_s"] > 1e7 and 0 < figures["link_measured"]["latency_s"] < 1
    asked = scenarios(OverlapOptions(prefill="24", sequences=8, microbatches="1,2"))
    results = {(result["scenario"], result["variant"]): result for result in figures["results"]}
    assert list(results) == [(scenario.name, variant.name) for scenario in asked for variant in scenario.variants]
    for (_, variant), result in results.items():
        low, high = result["speedup_range"]
        assert result["tokens_per_s"] > 0 and 0 < low <= result["speedup"] <= high
        assert result["equal_tokens"] == 1.0, "float32: the same tokens in every variant"
        assert result["max_in_flight"] == result["in_flight"]
        assert (result["divided_steps"] > 0) == (variant == "two-batch")
        assert 0 <= result["leader_waited_share"] < 1
        assert all(0 <= part < whole for part, whole in zip(result["progress_cpu_s"], result["cpu_s"], strict=True))
    assert sum(sum(result["progress_cpu_s"]) for result in results.values()) > 0
    off, on = results["tp2 prefill 24", "off"], results["tp2 prefill 24", "two-batch"]
    assert off["tokens"] == on["tokens"] == 2 * 24 and on["divided_steps"] == 2
    for rank in range(2):
        undivided, divided = (result["communicators"][rank]["tp"] for result in (off, on))
        # Of each of two prompts: the embedding, two a layer, the logits; the halves move as many bytes.
        assert undivided["operations"] == 2 * (1 + 2 * 2 + 1)
        assert divided["operations"] == 2 * (2 * (1 + 2 * 2) + 1)  # the first half draws nothing
        assert divided["bytes"] == undivided["bytes"]
    assert results["pp2 decode 8 each", "2 in flight"]["sequences"] == 16
    alone, two = (results["pp2 prefill 24", f"{lag} in flight"]["communicators"] for lag in (1, 2))
    hidden_bytes = 3 * 24 * 64 * 4
    assert alone[0]["pp 0>1"]["bytes"] == alone[1]["pp 0>1"]["bytes"] == two[0]["pp 0>1"]["bytes"] == hidden_bytes


def made_up(tokens, seconds):
    return {
        "tokens": tokens, "seconds": seconds, "leader_waited_s": 0.4 * seconds, "divided_steps": 0, "output": [[1, 2]],
        "counters": {"max_in_flight": 1}, "ranks": [{"cpu_s": 1.0, "progress_cpu_s": 0.1, "communicators": {}}] * 2,
    }


def test_aims_and_medians():
    options = OverlapOptions(prefill="512", microbatches="1,2", repeats=3)
    asked = scenarios(options)
    rates = {
        ("tp2 prefill 512", "off"): 100.0, ("tp2 prefill 512", "two-batch"): 125.0,
        ("pp2 prefill 512", "1 in flight"): 100.0, ("pp2 prefill 512", "2 in flight"): 150.0,
        ("pp2 decode 64 divided", "1 in flight"): 100.0, ("pp2 decode 64 divided", "2 in flight"): 130.0,
        ("pp2 decode 64 divided", "t(32)"): 70.0,  # t(64) / t(32) = 2 * 70 / 100
    }
    runs = {
        (scenario.name, variant.name): [
            # One repetition in three is slow: the median does not see it.
            made_up(1000, 1000 / rates.get((scenario.name, variant.name), 100.0) * factor) for factor in (1.0, 5.0, 1.0)
        ]
        for scenario in asked for variant in scenario.variants
    }
    figures = {
        **dataclasses.asdict(options), "agreed_two_batch_tokens": 256, "load_average": 0.0, "load_average_end": 0.0,
        "threads_per_rank": 1, "link_used": "none",
        "link_measured": {"bytes_per_s": 1e8, "both_ways_bytes_per_s": 1e8, "latency_s": 1e-5},
    }
    report(figures, asked, runs)
    met = {aim["aim"]: (aim["met"], aim["got"], aim["wanted"]) for aim in figures["aims"]}
    assert met == {
        "tp2 prefill 512: two-batch, communication 40% of the step": (True, 1.25, 1.2),
        "tp2 prefill 512: two-batch, on by agreement": (True, 1.25, 0.98),
        "pp2 prefill 512: 2 in flight": (False, 1.5, 1.6),
        "pp2 decode 64 each: 2 in flight": (False, 1.0, 1.6),
        "pp2 decode 64 divided: 2 in flight, of t(64) / t(32) = 1.40": (True, 1.3, 1.26),
    }
    assert "MISSED pp2 prefill 512" in table(figures) and "from 256 tokens on" in table(figures)


def test_decodes_are_measured_while_the_pipeline_is_full():
    def tick(number, prefill, decode):
        return Tick(now_s=float(number), waited_s=0.0, prefill_tokens=prefill, decode_tokens=decode, divided_steps=0)

    # Two steps in flight: two prefills, an idle tick, six decodes of 4 tokens, two ticks that wait for the last ones.
    ticks = [tick(0, 0, 0), tick(1, 10, 0), tick(2, 20, 0), tick(3, 20, 0)]
    ticks += [tick(3 + k, 20, 4 * k) for k in range(1, 7)] + [tick(10, 20, 24), tick(11, 20, 24)]
    # The leader's clock passes tick 4 when the last prefill is over, and tick 9 is the last that computes.
    assert steady(ticks, lag=2) == (4, 9)


def test_a_link_that_cannot_be_made_is_loopback_and_says_why(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with links.open_link("auto", 1e9) as link:
        assert link.description == "loopback: no namespaces here (not root)"
        assert link.prefixes == ((), ())
    with pytest.raises(LaunchError, match="not root"), links.open_link("namespaces", 1e9):
        pass
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LaunchError, match="no ip, tc, .* on PATH"), links.rate_limited_link(1e9):
        pass


@pytest.mark.parametrize("rate_gbit", [0.2, pytest.param(0.8, marks=pytest.mark.full)])
def test_the_link_has_its_rate(rate_gbit):
    need_namespaces()
    figures, text = run_overlap(
        "--hidden", "64", "--layers", "2", "--prefill", "8", "--layouts", "tp", "--repeats", "1", "--sequences", "2",
        "--output-tokens", "8", "--link", "namespaces", "--rate-gbit", str(rate_gbit),
    )
    assert f"link: rate-limited {rate_gbit:g} Gbit/s veth between two network namespaces" in text
    for name in ("bytes_per_s", "both_ways_bytes_per_s"):
        share = figures["link_measured"][name] * 8 / (rate_gbit * 1e9)
        # The burst lets the first bytes through at once; a busy machine may be slower than its link.
        assert 0.1 < share < 1.1, figures["link_measured"]


def namespaces(pids) -> set[str]:
    """Network namespaces of these processes, other than this one's."""
    found = set()
    for pid in pids:
        try:
            found.add(os.readlink(f"/proc/{pid}/ns/net"))
        except OSError:
            pass
    return found - {os.readlink("/proc/self/ns/net")}


def all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def test_nothing_stays_behind():
    need_namespaces()
    others = namespaces(all_pids())  # a test cluster of this session may have some, below this process too
    with pytest.raises(OSError, match="of the body"), links.rate_limited_link(1e9):
        made = namespaces(descendants(os.getpid())) - others
        assert len(made) == 3  # the bridge's and the ranks'
        raise OSError("of the body")
    assert not made & namespaces(all_pids())
    # Also where it is killed in the middle, without a chance to tidy up.
    process = subprocess.Popen(
        overlap_command(*TINY, "--repeats", "1000", "--link", "namespaces"), cwd=ROOT, env=rank_env(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )
    try:
        children: list[int] = []

        def started():
            children[:] = descendants(process.pid)
            return len(namespaces(children)) == 3 and len(children) >= 6  # three holders, mpiexec, its proxy, a rank

        assert soon(started, 60)
        made = namespaces(children)
        process.kill()
        process.wait()
        assert soon(lambda: not any(map(alive, children)) and not made & namespaces(all_pids()), 30)
    finally:
        kill_tree(process.pid)


def soon(condition, seconds) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
