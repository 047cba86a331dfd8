"""`hpcinfer doctor` on a machine with a GPU: what it reads of the device, and two ranks that were given the same one."""

from __future__ import annotations

import sys

import pytest
import torch

from hpcinfer.doctor.devices import gather_device, judge_devices
from hpcinfer.doctor.finding import Level, RankPlace
from hpcinfer.doctor.versions import driver_version, gather_versions
from hpcinfer.launch.env import LaunchEnvironment
from tests.doctor_world import RankStart, examine_process, examine_world
from tests.mpi import rank_env


def test_the_device_is_read(device):
    facts = gather_device(RankPlace(host="here"), LaunchEnvironment.from_environ())
    assert facts.num_visible == torch.cuda.device_count() and facts.name == torch.cuda.get_device_name(device)
    assert facts.uuid == str(torch.cuda.get_device_properties(device).uuid) != ""
    assert 0 < facts.free_bytes <= facts.total_bytes == torch.cuda.mem_get_info(device)[1]
    assert torch.version.cuda in facts.torch_build
    findings = judge_devices([facts])
    assert findings[0].level is Level.GREEN and facts.name in findings[0].found


def test_versions_of_the_driver_and_nccl(device):
    versions = gather_versions(RankPlace(), mpi="", has_gpu=True).versions
    assert versions["CUDA of torch"] == torch.version.cuda
    assert versions["NVIDIA driver"] == (driver_version() or "none")
    pytest.importorskip("cupy", reason="NCCL is asked through CuPy: pip install '.[cuda13]'")
    assert versions["NCCL"][0].isdigit() and versions["cupy"][0].isdigit()


@pytest.mark.timeout(180)
def test_one_process(tmp_path):
    command = [
        sys.executable, "-m", "hpcinfer", "doctor", "jobs/demo.toml", "--json", "--set", f"data.output={tmp_path / 'run'}",
        "--set", "parallel.tp=1", "--sys-root", str(tmp_path / "no-fabric"),
    ]
    examined = examine_process(command, rank_env(), timeout_s=150)
    assert examined.returncode == 0, examined.output
    green = examined.of("green")
    assert "one for each rank" in green["GPUs"]["found"] and "weights and K/V" in green
    assert examined.levels["GPU memory"] in ("green", "yellow")
    assert examined.report["seconds"] < 60


@pytest.mark.timeout(180)
def test_two_ranks_with_one_gpu(tmp_path):
    """Both are told to see the same one, as a wrong --gpu-bind does."""
    starts = [RankStart(env={"CUDA_VISIBLE_DEVICES": "0"})] * 2
    examined = examine_world(
        starts, timeout_s=150,
        arguments=["jobs/demo.toml", "--set", f"data.output={tmp_path / 'run'}", "--sys-root", tmp_path / "no-fabric"],
    )
    assert examined.returncode == 1, examined.output
    red = examined.of("red")
    assert "GPUs" in red, examined.output
    assert "ranks 0, 1 on host" in red["GPUs"]["found"] and "--gpus-per-node" in red["GPUs"]["fix"]
    assert examined.report["seconds"] < 60
