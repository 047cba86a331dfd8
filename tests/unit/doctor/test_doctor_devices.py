"""GPUs and versions, judged from made-up facts and read from planted /proc trees."""

from __future__ import annotations

import dataclasses
import importlib.metadata

import numpy as np
import pytest

from hpcinfer.doctor import devices, versions
from hpcinfer.doctor.devices import gather_device, gpus_usable, judge_devices, pci_address
from hpcinfer.doctor.finding import Level, absent, red
from hpcinfer.doctor.versions import driver_version, gather_versions, judge_versions
from hpcinfer.launch.env import LaunchEnvironment
from tests.doctor_facts import GIB, change, healthy_facts, place

VERSION = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build  (dvs-builder@U22-I3)  Wed Aug 27\n"
    "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n"
)


def gpus():
    return healthy_facts().devices


def none_at_all():
    return [dataclasses.replace(each, num_visible=0, uuid="", driver="") for each in gpus()]


def plant_proc(root):
    for pci, uuid in (("0000:1b:00.0", "GPU-aaaa-1"), ("0000:cb:00.0", "GPU-bbbb-2")):
        folder = root / "driver/nvidia/gpus" / pci
        folder.mkdir(parents=True)
        text = f"Model: \t\t NVIDIA H100\nIRQ:   \t\t 18\nGPU UUID: \t {uuid}\nBus Location: \t {pci}\n"
        (folder / "information").write_text(text)
    (root / "driver/nvidia/version").write_text(VERSION)
    return root


def test_the_driver_says_where_a_gpu_is(tmp_path):
    proc = plant_proc(tmp_path)
    assert pci_address("bbbb-2", proc) == pci_address("GPU-bbbb-2", proc) == "0000:cb:00.0"
    assert pci_address("cccc-3", proc) == "" and pci_address("aaaa-1", tmp_path / "nothing") == ""
    assert driver_version(proc) == "580.82.07" and driver_version(tmp_path / "nothing") == ""


def test_no_gpu_anywhere():
    facts = none_at_all()
    assert judge_devices(facts)[0].level is Level.ABSENT
    assert judge_devices(facts, setting="cpu")[0].level is Level.ABSENT
    red_ = judge_devices(facts, setting="cuda")[0]
    assert red_.level is Level.RED and 'engine.device = "cuda"' in red_.found


@pytest.mark.parametrize(
    ("build", "fix"), [("torch 2.13.0+cpu without CUDA", "cuda13"), ("torch 2.13.0 for CUDA 13.0", "--gpus-per-node")]
)
def test_a_driver_and_no_gpu_for_torch(build, fix):
    facts = [dataclasses.replace(each, driver="580.1", torch_build=build) for each in none_at_all()]
    finding = judge_devices(facts)[0]
    assert finding.level is Level.RED and "580.1" in finding.found and build in finding.found and fix in finding.fix


def test_slurm_gave_a_gpu_that_nobody_sees():
    facts = change(none_at_all(), 2, visible_devices=("0", "1"))
    finding = judge_devices(facts)[0]
    assert finding.level is Level.RED and "CUDA_VISIBLE_DEVICES=0,1" in finding.found and finding.where == ("n1",)
    assert judge_devices(change(none_at_all(), 2, visible_devices=()))[0].level is Level.ABSENT


def test_some_ranks_without():
    findings = judge_devices(change(gpus(), 3, num_visible=0, uuid=""))
    assert findings[0].level is Level.RED and findings[0].where == ("n1",)
    assert "no GPU for rank 3 on n1, one for each of the other 3" in findings[0].found


def test_the_same_uuid_on_two_hosts_is_no_fault():
    """Simulators and some drivers count from zero on each host."""
    facts = [dataclasses.replace(each, uuid=f"gpu-{each.place.local_rank}") for each in gpus()]
    assert not [finding for finding in judge_devices(facts) if finding.level is Level.RED]


def test_mixed_kinds_and_somebody_elses_work():
    findings = {finding.check: finding for finding in judge_devices(change(gpus(), 1, name="A100", free_bytes=60 * GIB))}
    assert findings["GPUs"].level is Level.GREEN
    assert findings["GPU kinds"].level is Level.YELLOW and "H100 (3); A100 (1)" in findings["GPU kinds"].found
    assert findings["GPU memory"].level is Level.YELLOW
    assert "20.0 GiB of 80.0 GiB in use before the start on rank 1 on n0" in findings["GPU memory"].found


def test_no_nccl():
    facts = change(gpus(), 2, nccl_error="ImportError: no module named cupy")
    finding = next(each for each in judge_devices(facts) if each.check == "NCCL")
    assert finding.level is Level.RED and "rank 2 on n1: ImportError" in finding.found and "cuda13" in finding.fix
    assert not [each for each in judge_devices(facts[2:3]) if each.check == "NCCL"], "one rank needs none"


def test_transfers_are_tried_only_where_nothing_is_wrong():
    facts = gpus()
    assert gpus_usable([absent("InfiniBand", ""), red("threads", "", "")], facts)
    assert not gpus_usable([red("GPUs", "shared", "")], facts)
    assert not gpus_usable([red("versions: NCCL", "differ", "")], facts)
    assert not gpus_usable([], change(facts, 1, nccl_error="none")) and not gpus_usable([], none_at_all())


def test_a_gpu_is_read_and_bound(monkeypatch, tmp_path):
    """A made-up CUDA with two GPUs: local rank 3 takes the second."""
    bound = []

    class Cuda:
        device_count = staticmethod(lambda: 2)
        set_device = staticmethod(bound.append)
        mem_get_info = staticmethod(lambda index: (70 + index, 80))

        @staticmethod
        def get_device_properties(index):
            return type("Properties", (), {"uuid": ("aaaa-1", "bbbb-2")[index], "name": "H100"})

    monkeypatch.setattr(devices.torch, "cuda", Cuda)
    monkeypatch.setattr(devices.torch.version, "cuda", "13.0")
    environment = LaunchEnvironment({"CUDA_VISIBLE_DEVICES": "0,1"})
    facts = gather_device(place(3, ranks_a_node=4), environment, proc=plant_proc(tmp_path))
    assert bound == [1]
    assert (facts.uuid, facts.pci, facts.free_bytes, facts.total_bytes) == ("bbbb-2", "0000:cb:00.0", 71, 80)
    assert facts.driver == "580.82.07" and facts.visible_devices == ("0", "1") and "CUDA 13.0" in facts.torch_build
    assert facts.nccl_error  # there is no CuPy in the environment of these tests


def test_a_version_that_differs_without_harm():
    facts = healthy_facts().versions
    other = change(facts, 1, versions={**facts[1].versions, "kernel": "5.14"})
    findings = judge_versions(other)
    assert [finding.level for finding in findings] == [Level.GREEN, Level.YELLOW]
    assert findings[1].check == "versions: kernel" and findings[1].where == ("n0",)


def test_versions_of_this_process(monkeypatch):
    real = importlib.metadata.version
    facts = gather_versions(place(0), mpi="MPICH 5.0.2", has_gpu=False)
    assert facts.versions["numpy"] == np.__version__ and facts.versions["MPI"] == "MPICH 5.0.2"
    assert facts.versions["cupy"] == facts.versions["NCCL"] == "none"
    monkeypatch.setattr(versions.importlib.metadata, "version", lambda name: "9.9" if name == "tokenizers" else real(name))
    skewed = gather_versions(place(1), mpi="MPICH 5.0.2", has_gpu=False)
    assert [finding.check for finding in judge_versions([facts, skewed])] == ["versions: tokenizers"]
