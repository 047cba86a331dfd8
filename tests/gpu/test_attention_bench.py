"""`bench attention` and the limits of the machine on a GPU."""

from __future__ import annotations

import json

import torch

from hpcinfer.bench.limits import machine_limits
from hpcinfer.cli import main as cli


def test_limits(device):
    limits = machine_limits("bfloat16", device)
    # An A100 PCIe has 1.6 TB/s and 312 Tflop/s, a B200 8 TB/s and 2,250: within a factor of any GPU of 8.0 or later.
    assert 1e11 < limits.read_bytes_per_s < 2e13 and 1e13 < limits.matmul_flops_per_s < 1e16


def test_figures(device, capsys):
    arguments = ["--contexts", "512,4096", "--sequences", "1,32", "--prefill", "1024", "--repeats", "5"]
    assert cli.main(["bench", "attention", *arguments]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["device"] == torch.cuda.get_device_name(device) and not figures["left_out"]
    assert [(case["phase"], case["tokens"], case["sequences"]) for case in figures["cases"]] == [
        ("decode", 512, 1), ("decode", 512, 32), ("decode", 4096, 1), ("decode", 4096, 32), ("prefill", 1024, 1),
    ]  # fmt: skip
    # Above 1 keys and values would come out of a cache; this is what turns over several sets prevent.
    assert all(0 < case["share"] < 1.05 for case in figures["cases"])
