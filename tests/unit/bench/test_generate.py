"""`bench generate`: its last line is one JSON object, on one rank and on two, and its options are those of the dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys

import pytest

from hpcinfer.bench.generate import GenerateOptions
from hpcinfer.bench.workloads import WORKLOADS, make_requests
from hpcinfer.cli import bench
from tests.conftest import ROOT
from tests.mpi import rank_env


def test_workloads_are_fixed():
    for name, workload in WORKLOADS.items():
        requests = make_requests(workload, 1000)
        again = make_requests(workload, 1000)
        assert [r.prompt_token_ids.tolist() for r in requests] == [r.prompt_token_ids.tolist() for r in again]
        prompts = [len(r.prompt_token_ids) for r in requests]
        outputs = [r.sampling.max_tokens for r in requests]
        assert len(requests) == 64, name
        assert workload.prompt_tokens[0] <= min(prompts) and max(prompts) <= workload.prompt_tokens[1]
        assert workload.output_tokens[0] <= min(outputs) and max(outputs) <= workload.output_tokens[1]


def test_defaults_of_the_command_line_are_those_of_the_options():
    parser = argparse.ArgumentParser()
    bench.configure(parser)
    given = vars(parser.parse_args(["generate"]))
    del given["benchmark"]
    assert given == dataclasses.asdict(GenerateOptions())


@pytest.mark.parametrize("settings", [["--workload", "W2"], ["--tp", "2"], pytest.param(["--pp", "2", "--workload", "W3", "--dtype", "float32"], marks=pytest.mark.full)])
def test_figures(settings):
    result = subprocess.run(
        [sys.executable, "-m", "hpcinfer", "bench", "generate", "--model", "small", *settings],
        cwd=ROOT, env=rank_env(), capture_output=True, text=True, check=False, timeout=280,
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    workload = WORKLOADS[figures["workload"]]
    assert figures["output_tokens"] == sum(r.sampling.max_tokens for r in make_requests(workload, 4096))
    assert figures["output_tokens_per_s"] > 0 and figures["peak_memory_bytes"] > 2**20
    assert 0 < figures["decode_share_of_bandwidth"] and 0 < figures["prefill_share_of_matrix_rate"]
    assert figures["limits"]["read_bytes_per_s"] >= 21e9
