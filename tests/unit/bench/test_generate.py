"""`bench generate`: its last line is one JSON object, on one rank and on two, and its options are those of the dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from hpcinfer.bench.dimensions import DIMENSIONS
from hpcinfer.bench.generate import GenerateOptions
from hpcinfer.bench.workloads import WORKLOADS, find_workload, make_requests
from hpcinfer.cli import bench
from hpcinfer.config.model import ModelConfig
from hpcinfer.errors import UsageError
from hpcinfer.models.footprint import stage_parameters
from tests.conftest import ROOT
from tests.mpi import rank_env


def test_workloads_are_fixed():
    for name, workload in WORKLOADS.items():
        requests = make_requests(workload, 1000)
        again = make_requests(workload, 1000)
        assert [r.prompt_token_ids.tolist() for r in requests] == [r.prompt_token_ids.tolist() for r in again]
        prompts = [len(r.prompt_token_ids) for r in requests]
        outputs = [r.sampling.max_tokens for r in requests]
        assert len(requests) == workload.num_prompts, name
        assert workload.prompt_tokens[0] <= min(prompts) and max(prompts) <= workload.prompt_tokens[1]
        assert workload.output_tokens[0] <= min(outputs) and max(outputs) <= workload.output_tokens[1]


def test_chat_lengths_have_the_published_means_and_a_long_tail():
    requests = make_requests(find_workload("chat"), 1000)
    prompts = np.array([len(request.prompt_token_ids) for request in requests])
    outputs = np.array([request.sampling.max_tokens for request in requests])
    assert len(requests) == 1000 and abs(prompts.mean() - 227) < 25 and abs(outputs.mean() - 188) < 20
    assert np.median(prompts) < 0.75 * prompts.mean() and prompts.max() > 4 * prompts.mean()


def test_lengths_by_name():
    workload = find_workload("1000x500", 3)
    assert workload.longest == 1500
    assert [(len(r.prompt_token_ids), r.sampling.max_tokens) for r in make_requests(workload, 50)] == [(1000, 500)] * 3
    for wrong in ("0x5", "5x", "W9"):
        with pytest.raises(UsageError, match="INxOUT"):
            find_workload(wrong)


@pytest.mark.parametrize("name", DIMENSIONS)
def test_dimensions_are_configs_that_can_be_read(name):
    config = ModelConfig.from_dict(DIMENSIONS[name])
    parameters = stage_parameters(config, range(config.num_layers))
    published = {"llama-3.1-8b": 8.03e9, "qwen3-0.6b": 0.596e9, "gpt-oss-20b": 20.9e9, "gpt-oss-20b-mxfp4": 20.9e9}
    if name in published:
        assert abs(parameters / published[name] - 1) < 0.02, f"{parameters:.3e}"


def test_defaults_of_the_command_line_are_those_of_the_options():
    parser = argparse.ArgumentParser()
    bench.configure(parser)
    given = vars(parser.parse_args(["generate"]))
    del given["benchmark"]
    assert given == dataclasses.asdict(GenerateOptions())


@pytest.mark.parametrize("settings", [["--workload", "40x6", "--prompts", "6", "--run-ahead", "on", "--against", "transformers"], ["--tp", "2"], pytest.param(["--pp", "2", "--workload", "W3", "--dtype", "float32"], marks=pytest.mark.full)])
def test_figures(settings):
    result = subprocess.run(
        [sys.executable, "-m", "hpcinfer", "bench", "generate", "--model", "small", *settings],
        cwd=ROOT, env=rank_env(), capture_output=True, text=True, check=False, timeout=280,
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    workload = find_workload(figures["workload"], figures["prompts"])
    assert figures["output_tokens"] == sum(r.sampling.max_tokens for r in make_requests(workload, 4096))
    assert figures["output_tokens_per_s"] > 0 and figures["peak_memory_bytes"] > 2**20
    assert 0 < figures["decode_share_of_bandwidth"] and 0 < figures["prefill_share_of_matrix_rate"]
    assert figures["limits"]["read_bytes_per_s"] >= 21e9
    if figures["against"]:
        assert figures["transformers"]["output_tokens_per_s"] > 0
