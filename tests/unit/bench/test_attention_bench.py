"""`bench attention`: its last line is one JSON object, its options are those of the dataclass, its work is counted right."""

from __future__ import annotations

import argparse
import dataclasses
import json

import pytest
import torch

from hpcinfer.bench import attention, limits
from hpcinfer.bench.attention import AttentionOptions
from hpcinfer.cli import bench
from hpcinfer.cli import main as cli

SMALL = ["--device", "cpu", "--heads", "4", "--kv-heads", "2", "--head-dim", "32", "--contexts", "20,64", "--sequences", "1,3", "--prefill", "48"]


@pytest.fixture
def fixed_limits(monkeypatch):
    """1 byte and 1 operation a second: shares are the work over the time."""
    figures = limits.MachineLimits(
        read_bytes_per_s=1.0, matmul_flops_per_s=1.0, measured_read_bytes_per_s=1.0, measured_matmul_flops_per_s=1.0
    )
    monkeypatch.setattr(attention, "machine_limits", lambda dtype, device: figures)


def run(capsys, *arguments) -> tuple[str, dict]:
    assert cli.main(["bench", "attention", *SMALL, "--repeats", "2", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    return "\n".join(lines[:-1]), json.loads(lines[-1])


def test_defaults_of_the_command_line_are_those_of_the_options():
    parser = argparse.ArgumentParser()
    bench.configure(parser)
    given = vars(parser.parse_args(["attention"]))
    del given["benchmark"]
    assert given == dataclasses.asdict(AttentionOptions())


def test_figures(capsys, fixed_limits):
    text, figures = run(capsys, "--dtype", "float32", "--backends", "SDPA,NAIVE,TRITON")
    sizes = [("decode", 20, 1), ("decode", 20, 3), ("decode", 64, 1), ("decode", 64, 3), ("prefill", 48, 1)]
    assert [(c["backend"], c["phase"], c["tokens"], c["sequences"]) for c in figures["cases"]] == [
        (backend, *size) for backend in ("SDPA", "NAIVE") for size in sizes
    ]
    for case in figures["cases"]:
        # Keys and values of 2 heads of 32 float32; 2 products of 4 heads of 32 for each pair on or under the diagonal.
        work = 2 * case["sequences"] * case["tokens"] * 2 * 32 * 4 if case["phase"] == "decode" else 4 * 4 * 32 * (48 * 49 // 2)
        assert case["bytes" if case["phase"] == "decode" else "flops"] == work
        assert case["share"] == pytest.approx(work / (case["microseconds"] / 1e6)) and case["sets"] == 16
    assert figures["left_out"] == [{"backend": "TRITON", "reason": "needs an NVIDIA GPU"}]
    assert "TRITON          left out: needs an NVIDIA GPU" in text and text.count("of the bandwidth") == 8


def test_a_window_reads_less(capsys, fixed_limits):
    _, figures = run(capsys, "--window", "16", "--sinks", "--block-size", "8", "--sequences", "2", "--contexts", "64")
    decode, prefill = figures["cases"]
    assert decode["bytes"] == 2 * 2 * 16 * 2 * 32 * 2 and decode["block_size"] == 8
    assert prefill["flops"] == 4 * 4 * 32 * (16 * 17 // 2 + (48 - 16) * 16)


def test_calls_take_turns_over_the_sets(monkeypatch, fixed_limits):
    monkeypatch.setattr(attention, "_CPU_CACHE_BYTES", 10 * 2**10)
    seen = []
    plain = attention._Case._call
    monkeypatch.setattr(attention._Case, "_call", lambda self, metadata: (seen.append(id(metadata)), plain(self, metadata)))
    options = AttentionOptions(
        device="cpu", dtype="float32", heads=2, kv_heads=1, head_dim=16, contexts="64", sequences="1", prefill="64", repeats=7
    )
    figures = attention.run_attention(options)
    assert [case["sets"] for case in figures["cases"]] == [5, 5]  # 4 x 10 KiB in sets of 8 KiB
    decodes = seen[: 5 + 7]
    assert decodes[:5] == decodes[5:10] and len(set(decodes)) == 5


def test_what_does_not_fit_is_left_out(capsys, monkeypatch, fixed_limits):
    monkeypatch.setattr(attention, "available_host_bytes", lambda ranks: 2**16)
    _, figures = run(capsys, "--dtype", "float32")
    assert [(c["phase"], c["tokens"], c["sequences"]) for c in figures["left_out"]] == [("decode", 64, 3)]
    assert "96.0 KiB, room for 32.0 KiB" in figures["left_out"][0]["reason"]
    assert len(figures["cases"]) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--contexts", "1,x"], "--contexts 1,x"), (["--prefill", "0"], "--prefill 0"), (["--kv-heads", "0"], "--kv-heads 0"),
        (["--window", "-1"], "--window -1"), (["--device", "cuda"], "no CUDA device"), (["--heads", "5"], "--heads 5 over --kv-heads 2"),
    ],
)
def test_usage_errors(capsys, monkeypatch, fixed_limits, arguments, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code = cli.main(["bench", "attention", *SMALL, *arguments])
    shown = capsys.readouterr()
    assert code == 2 and words in shown.err and "Traceback" not in shown.err


def test_limits_of_a_cpu_are_at_least_the_reference(monkeypatch):
    monkeypatch.setattr(limits, "measure_read", lambda device: 5.0)
    monkeypatch.setattr(limits, "measure_matmul", lambda dtype, device: 1e18)
    found = limits.machine_limits("float32")
    assert found.read_bytes_per_s == limits.REFERENCE_READ_BYTES_PER_S and found.measured_read_bytes_per_s == 5.0
    assert found.matmul_flops_per_s == found.measured_matmul_flops_per_s == 1e18
    found = limits.machine_limits("float32", torch.device("cuda", 0))
    assert found.read_bytes_per_s == 5.0  # no reference for GPUs


def test_the_best_of_five_calls_counts(monkeypatch):
    clock = iter([0.0, 3.0, 10.0, 11.0, 20.0, 22.0, 30.0, 35.0, 40.0, 44.0])
    monkeypatch.setattr(limits.time, "perf_counter", lambda: next(clock))
    calls = []
    assert limits.best_seconds(lambda: calls.append(1), torch.device("cpu")) == 1.0 and len(calls) == 6
