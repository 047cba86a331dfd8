"""`hpcinfer doctor` finds faults that are really there: file systems, files, limits, versions and links of single ranks."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcinfer.bench.link import rate_limited_network
from hpcinfer.errors import LaunchError
from tests.checkpoints import make_checkpoint
from tests.conftest import ROOT
from tests.doctor_facts import plant_ports
from tests.doctor_world import TWO_NODES, RankStart, examine_world, need_mpich

pytestmark = pytest.mark.timeout(150)
RANK = ("-m", "tests.ranks.doctor_rank")
NO_EXCLUSIVE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>

/* A file system that forgets O_EXCL. */
static int mode_of(int flags, va_list rest) { return flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0; }

#define FORGETFUL(name) \\
    int name(const char *path, int flags, ...) { \\
        va_list rest; va_start(rest, flags); int mode = mode_of(flags, rest); va_end(rest); \\
        int (*next)(const char *, int, ...) = dlsym(RTLD_NEXT, #name); \\
        return next(path, flags & ~O_EXCL, mode); \\
    }
FORGETFUL(open)
FORGETFUL(open64)
"""


@pytest.fixture(autouse=True)
def mpich() -> None:
    need_mpich()


def shell(command: str) -> tuple[str, ...]:
    """A prefix: run a shell command in the rank's process first."""
    return ("sh", "-c", f'{command} && exec "$@"', "rank")


def settings(**values: str) -> list[str]:
    """Arguments of the demo job with other settings; `model_path` is model.path. Without GPUs."""
    words = ["jobs/demo.toml"]
    values.setdefault("engine_device", "cpu")
    for name, value in values.items():
        words += ["--set", f"{name.replace('_', '.', 1)}={value}"]
    return words


def need_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root: run the tests as root, or in a container")


def mount(*arguments: str | Path) -> None:
    need_root()
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mount {' '.join(map(str, arguments))}: {done.stderr.strip()}")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "read-only"
    folder.mkdir()
    mount("--bind", folder, folder)
    subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB with 100 KiB left."""
    folder = tmp_path / "full"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=2m", "none", folder)
    (folder / "ballast").write_bytes(bytes(2**21 - 100 * 2**10))
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def broken_model(tmp_path_factory) -> Path:
    """A checkpoint of several shards, of which one is missing, without a tokenizer."""
    folder = make_checkpoint(tmp_path_factory.mktemp("model"), max_shard_size="40KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    return folder


def test_many_faults_at_once(tmp_path, broken_model, read_only):
    """Four ranks on two nodes. On the second node everything is wrong at once, and every fault has a row of its own."""
    healthy, sick = {"mlx5_0": {}, "mlx5_1": {}, "mlx5_2": {"numa_node": "0"}}, {
        "mlx5_0": {"state": "1: DOWN", "phys_state": "2: Polling"}, "mlx5_1": {"rate": "100 Gb/sec (2X HDR)"},
        "mlx5_2": {"numa_node": "1"},
    }
    trees = [plant_ports(tmp_path / f"sys{node}", ports) for node, ports in enumerate((healthy, sick))]
    other_versions = tmp_path / "other/tokenizers-0.0.1.dist-info"
    other_versions.mkdir(parents=True)
    (other_versions / "METADATA").write_text("Metadata-Version: 2.1\nName: tokenizers\nVersion: 0.0.1\n")
    paths = {"PYTHONPATH": f"{other_versions.parent}:{ROOT}"}
    limits = shell("ulimit -l 64")
    starts = [RankStart(arguments=["--sys-root", trees[rank % 2]], prefix=limits) for rank in range(4)]
    starts[1] = dataclasses.replace(starts[1], prefix=shell("ulimit -l 64 && ulimit -n 90"), env=paths)
    job = settings(
        model_path=str(broken_model), data_output=str(read_only / "run"), engine_kv_memory="1 KiB", engine_max_context="256",
        parallel_tp="2",
    )
    examined = examine_world(starts, job, env=TWO_NODES)
    assert examined.returncode == 1, examined.output
    red = examined.faults
    assert set(red) == {
        "InfiniBand ports", "InfiniBand rate", "NIC placement", "locked memory", "versions: tokenizers", "output: write",
        "model files", "tokenizer", "weights and K/V", "file handles",
    }, examined.output
    assert all(finding["fix"] for finding in red.values())
    host = os.uname().nodename
    for check in ("InfiniBand ports", "InfiniBand rate", "NIC placement", "versions: tokenizers", "file handles"):
        assert red[check]["where"] == [f"{host}#1"], red[check]
    assert "mlx5_0:1 is DOWN (Polling)" in red["InfiniBand ports"]["found"]
    assert "mlx5_1:1 runs at 100 Gb/sec (2X HDR)" in red["InfiniBand rate"]["found"]
    assert "mlx5_2:1 is on NUMA node 1" in red["NIC placement"]["found"]
    assert f"tokenizers 0.0.1 on rank 2 on {host}#1" in red["versions: tokenizers"]["found"]
    assert f"90 on rank 2 on {host}#1" in red["file handles"]["found"] and "ulimit -n" in red["file handles"]["fix"]
    assert "Read-only file system" in red["output: write"]["found"] and "read-only" in red["output: write"]["fix"]
    assert "model-00002-of" in red["model files"]["found"] and "no tokenizer.json" in red["tokenizer"]["found"]
    assert "no memory for the keys and values" in red["weights and K/V"]["found"]
    assert "raise engine.kv_memory" in red["weights and K/V"]["fix"]


def test_a_full_disk_and_one_gpu_for_two_ranks(full_disk):
    starts = [RankStart(env={"DOCTOR_TEST_FAULT": "gpu"})] * 2
    examined = examine_world(starts, settings(data_output=str(full_disk / "run"), engine_device="auto"), program=RANK)
    assert examined.returncode == 1, examined.output
    red = examined.faults
    assert set(red) == {"GPUs", "output: write", "free space"}, examined.output
    assert "ranks 0, 1 on host" in red["GPUs"]["found"] and "have GPU the-one" in red["GPUs"]["found"]
    assert "No space left on device" in red["output: write"]["found"] and "make room" in red["output: write"]["fix"]
    assert red["free space"]["found"].startswith("100.0 KiB in")
    assert [path.name for path in full_disk.iterdir()] == ["ballast"], "nothing stays behind"


def test_a_node_whose_file_system_forgets_o_excl(tmp_path):
    """Two nodes of one rank; on one of them open() is not exclusive."""
    (tmp_path / "shim.c").write_text(NO_EXCLUSIVE)
    shim = tmp_path / "shim.so"
    done = subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", str(shim), str(tmp_path / "shim.c"), "-ldl"], capture_output=True, text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    starts = [RankStart(), RankStart(prefix=("env", f"LD_PRELOAD={shim}"))]
    (tmp_path / "shared").mkdir()
    job = settings(data_output=str(tmp_path / "shared/run"), parallel_tp="1")
    examined = examine_world(starts, job, env=TWO_NODES)
    assert examined.returncode == 1, examined.output
    red = examined.faults
    assert list(red) == ["output: exclusive names"], examined.output
    finding = red["output: exclusive names"]
    assert finding["found"].startswith("O_EXCL: 16 of 32 names were given twice"), finding
    assert f"{os.uname().nodename}#1" in finding["where"]


@pytest.mark.full
def test_an_output_that_only_one_node_sees(tmp_path):
    """A disk of its own under the same name on the second node: what /tmp is on most clusters."""
    need_root()
    folder = tmp_path / "local"
    folder.mkdir()
    own_disk = ("unshare", "--mount", *shell(f"mount -t tmpfs none {folder}"))
    examined = examine_world(
        [RankStart(), RankStart(prefix=own_disk)], settings(data_output=str(folder / "run"), parallel_tp="1"), env=TWO_NODES
    )
    assert examined.returncode == 1, examined.output
    red = examined.faults
    assert list(red) == ["output: shared"] and "one folder for all nodes" in red["output: shared"]["fix"], examined.output
    assert list(folder.iterdir()) == []


def test_a_slow_link(tmp_path):
    """Four nodes in network namespaces of their own; what the third sends and receives is held down by tc tbf."""
    try:
        with rate_limited_network([1e9, 1e9, 0.05e9, 1e9]) as link:
            starts = [RankStart(prefix=prefix) for prefix in link.prefixes]
            job = settings(data_output=str(tmp_path / "run"), parallel_tp="1")
            examined = examine_world(starts, job, env=link.environment)
    except LaunchError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.found}")
    assert examined.returncode == 1, examined.output
    red = examined.of("red")
    assert list(red) == ["links between nodes"], examined.output
    slow = f"{os.uname().nodename}#2"
    finding = red["links between nodes"]
    assert finding["where"] == [slow] and finding["found"].startswith(f"{slow} sends at"), finding
    assert f"--exclude={slow}" in finding["fix"]
    assert examined.report["seconds"] < 60
