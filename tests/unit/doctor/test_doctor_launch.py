"""How ranks were started: worlds, cores, threads, and what a login node can know."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from hpcinfer.doctor.finding import Level
from hpcinfer.doctor.launch import (
    LoginFacts, gather_login, judge_cores, judge_login, judge_ranks_a_node, judge_world, listed_flavours,
)
from tests.doctor_facts import change, healthy_facts

LISTS = {
    "22.05": ("MPI plugin types are...\n\tnone\n\tpmi2\n\tcray_shasta\n", ("none", "pmi2", "cray_shasta")),
    "20.02": (
        "srun: MPI types are...\nsrun: pmix_v3\nsrun: none\nsrun: pmix\nsrun: pmi2\n", ("pmix_v3", "none", "pmix", "pmi2"),
    ),
    "23.11": (
        "MPI plugin types are...\n\tnone\n\tpmix\nspecific pmix plugin versions available: pmix_v4,pmix_v5\n",
        ("none", "pmix", "pmix_v4", "pmix_v5"),
    ),
    "nothing": ("srun: fatal: Could not establish a configuration source\n", ()),
}


@pytest.mark.parametrize("version", LISTS)
def test_the_list_of_plugins(version):
    text, flavours = LISTS[version]
    assert listed_flavours(text) == flavours


def launched():
    return healthy_facts().launch


def test_a_world_that_is_not_what_was_started():
    # Two worlds of two ranks each: not the singletons that a run refuses by itself.
    facts = [dataclasses.replace(each, world_size=2) for each in launched()]
    red = judge_world(facts)[1]
    assert red.level is Level.RED and "started 4 ranks; MPI has worlds of 2" in red.found and "--mpi=pmi2" in red.fix
    facts = [dataclasses.replace(each, launcher="mpiexec", flavour="") for each in facts]
    assert "mpiexec that came with" in judge_world(facts)[1].fix
    assert "started by srun --mpi=pmi2" in judge_world(launched())[1].found


def test_nodes_with_fewer_ranks_are_named():
    assert judge_ranks_a_node(launched()).found == "2 nodes x 2 ranks"
    found = judge_ranks_a_node(launched()[:3])
    assert found.level is Level.YELLOW and found.where == ("n1",) and "1 on n1" in found.found


def test_ranks_bound_to_one_core():
    """What srun does without --cpus-per-task: two ranks on the same core of a node with sixteen."""
    facts = [dataclasses.replace(each, cores=frozenset({0}), threads=1) for each in launched()]
    binding, threads = judge_cores(facts)
    assert binding.level is Level.RED and "ranks 0-1 on n0 share 1 of the node's 16 cores" in binding.found
    assert binding.where == ("n0", "n1") and "--cpus-per-task" in binding.fix
    assert threads.level is Level.YELLOW and "at most 1 ranks a node" in threads.fix


def test_a_small_machine_is_not_a_wrong_binding():
    facts = [dataclasses.replace(each, cores=frozenset({0}), machine_cores=1, threads=1) for each in launched()]
    assert [finding.level for finding in judge_cores(facts)] == [Level.GREEN, Level.YELLOW]


def test_more_threads_than_cores():
    facts = change(launched(), 3, threads=16)
    binding, threads = judge_cores(facts)
    assert binding.level is Level.GREEN and "8 cores for each rank" in binding.found
    assert threads.level is Level.YELLOW and threads.where == ("n1",) and "OMP_NUM_THREADS=8" in threads.fix


def test_cores_that_differ_are_told():
    facts = change(launched(), 0, cores=frozenset(range(4)), threads=4)
    assert judge_cores(facts)[0].found == "8 cores for rank 1 on n0; ranks 2-3 on n1; 4 cores for rank 0 on n0"


@pytest.mark.parametrize(
    ("facts", "num_ranks", "levels"),
    [
        (LoginFacts(mpi="MPICH 5.0.2"), 2, ["green", "not here"]),
        (LoginFacts(mpi="MPICH 5.0.2", has_srun=True), 2, ["green", "not here"]),
        (LoginFacts(mpi="MPICH 5.0.2", has_srun=True, flavours=("none", "pmi2")), 2, ["green", "green"]),
        (LoginFacts(mpi="Open MPI 5.0.11", has_srun=True, flavours=("none", "pmi2")), 2, ["green", "red"]),
        (LoginFacts(mpi="Open MPI 5.0.11", has_srun=True, flavours=("none", "pmix_v4")), 2, ["green", "green"]),
        (LoginFacts(mpi="MPICH 4.0", threads=False), 1, ["red", "not here"]),
        (LoginFacts(mpi_error="no libmpi"), 1, ["yellow", "not here"]),
        (LoginFacts(mpi_error="no libmpi"), 2, ["red", "not here"]),
        (LoginFacts(mpi_error="no libmpi", has_srun=True, flavours=("pmi2",)), 1, ["red", "green"]),
    ],
)
def test_a_login_node(facts, num_ranks, levels):
    findings = judge_login(facts, num_ranks=num_ranks)
    assert [str(finding.level) for finding in findings] == levels
    assert all(finding.fix for finding in findings if finding.level in (Level.RED, Level.YELLOW))


def test_this_machine_is_asked_in_a_process_of_its_own():
    loaded = "mpi4py.MPI" in sys.modules
    facts = gather_login()
    assert facts.mpi.partition(" ")[0] and facts.threads and not facts.mpi_error
    assert ("mpi4py.MPI" in sys.modules) == loaded


def test_an_mpi_that_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("raise ImportError('libmpi.so.12 is not there')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    facts = gather_login()
    assert facts.mpi == "" and "libmpi.so.12 is not there" in facts.mpi_error
