"""The engine on a GPU: graphs and running ahead change no text, and nothing grows while it works."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

import hpcinfer
from hpcinfer.config.job import EngineSection
from hpcinfer.request import SamplingParams
from tests.conftest import ROOT

MODEL = ROOT / "datasets/demo-model"
PROMPTS = [f"{a}+{b}=" for a in range(10, 40) for b in (7, 48)] + ["reverse abcdefgh:", "sort 5 3 9 1:"]


def answers(sampling: SamplingParams = SamplingParams(max_tokens=24), **settings) -> dict[int, str]:
    engine = hpcinfer.Engine(MODEL, dtype="float32", engine=EngineSection(max_sequences=16, max_batch_tokens=64, **settings))
    return {generation.row: generation.text for generation in engine.generate(PROMPTS, sampling)}


@pytest.fixture(scope="module")
def on_cpu():
    return answers(device="cpu")


@pytest.mark.parametrize(
    "settings",
    [
        {"graphs": "off", "run_ahead": "off"}, {"graphs": "on", "run_ahead": "off"}, {"graphs": "off", "run_ahead": "on"},
        {"graphs": "on", "run_ahead": "on"}, {},
    ],
    ids=str,
)
def test_the_text_is_that_of_the_cpu(settings, on_cpu):
    found = answers(device="cuda", **({"attention": "TRITON"} if settings.get("graphs") == "on" else {}), **settings)
    differing = [row for row in on_cpu if found[row] != on_cpu[row]]
    assert not differing, f"{len(differing)} rows, the first: {found[differing[0]]!r} instead of {on_cpu[differing[0]]!r}"


def test_draws_are_those_of_the_cpu():
    sampling = SamplingParams(max_tokens=24, temperature=0.8, top_p=0.9, seed=5, n=2)
    cpu, gpu = answers(sampling, device="cpu"), answers(sampling, device="cuda")
    assert cpu == gpu


def test_nothing_grows_between_200_and_1000_steps():
    engine = hpcinfer.Engine(MODEL, dtype="bfloat16", engine=EngineSection(device="cuda", max_sequences=16))
    seen = {}
    prompts = (rng_prompt(number) for number in range(10**9))
    for _ in engine.generate(prompts, SamplingParams(max_tokens=32, ignore_eos=True)):
        ticks = engine.scheduler.counters.ticks
        for mark in (200, 1000):
            if ticks >= mark and mark not in seen:
                torch.cuda.synchronize()
                seen[mark] = (torch.cuda.memory_allocated(), resident_bytes(), len(os.listdir("/proc/self/fd")))
        if 1000 in seen:
            break
    (device_200, host_200, files_200), (device_1000, host_1000, files_1000) = seen[200], seen[1000]
    assert device_1000 == device_200 and files_1000 == files_200
    assert host_1000 - host_200 < 16 * 2**20, f"{host_1000 - host_200} bytes of host memory more"


def rng_prompt(number: int) -> list[int]:
    return np.random.default_rng(number).integers(3, 200, 5 + number % 20).tolist()


def resident_bytes() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))
