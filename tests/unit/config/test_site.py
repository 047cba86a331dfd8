"""Site files: read strictly, found by name and path."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcinfer.config.load import from_tables
from hpcinfer.config.site import Site, find_site, load_site, nccl_environment, site_folders, time_limit_s
from hpcinfer.errors import ConfigError
from tests.conftest import ROOT

EXAMPLES = sorted((ROOT / "slurm" / "sites").glob("*.toml"))


def site(**tables) -> Site:
    return from_tables(Site, tables, "the site file")


def test_everything_has_a_default():
    assert site() == Site()
    assert Site().slurm.mpi == "pmi2" and nccl_environment(Site()) == {}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_valid(path):
    assert load_site(str(path)) == load_site(path.stem, [path.parent])


def test_the_examples_cover_the_kinds_of_cluster():
    sites = {path.stem: load_site(str(path)) for path in EXAMPLES}
    assert {"infiniband-nvlink", "infiniband-pcie", "no-requeue", "cpu"} <= sites.keys()
    assert not sites["no-requeue"].slurm.requeue and sites["cpu"].slurm.gpus_per_node == 0
    assert nccl_environment(sites["infiniband-pcie"]) == {
        "NCCL_SOCKET_IFNAME": "ib", "NCCL_IB_HCA": "=mlx5_0:1", "NCCL_NET_GDR_LEVEL": "PHB", "NCCL_PROTO": "allreduce:LL,Simple",
        "NCCL_ALGO": "Ring;allreduce:Tree,Ring", "NCCL_MIN_NCHANNELS": "2", "NCCL_MAX_NCHANNELS": "4", "NCCL_BUFFSIZE": "2097152",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"slrum": {}}, "did you mean slurm"),
        ({"slurm": {"partitions": "x"}}, "did you mean partition"),
        ({"slurm": {"gpus_per_node": "4"}}, "a whole number"),
        ({"slurm": {"requeue": 1}}, "true or false"),
        ({"slurm": {"options": "--exclusive"}}, "a list of texts"),
        ({"slurm": {"options": [1]}}, "a list of texts"),
        ({"slurm": {"options": ["-p gpu"]}}, "long name"),
        ({"slurm": {"options": ["exclusive"]}}, "long name"),
        ({"slurm": {"options": ["--nodes=3"]}}, "writes --nodes itself"),
        ({"slurm": {"srun_options": ["--mpi=none"]}}, "writes --mpi itself"),
        ({"slurm": {"partition": "a\nb"}}, "cannot carry line breaks"),
        ({"slurm": {"options": ["--comment=a\nb"]}}, "cannot carry line breaks"),
        ({"slurm": {"time": "4 hours"}}, "04:00:00"),
        ({"slurm": {"signal_s": 0}}, "1 or more"),
        ({"slurm": {"signal_s": 65536}}, "65535"),
        ({"slurm": {"mpi": "pmi2 -x"}}, "srun --mpi=list"),
        ({"slurm": {"gpu_type": "h100"}}, "gpus_per_node too"),
        ({"environment": {"variables": {"A-B": "x"}}}, "letters, digits"),
        ({"environment": {"variables": {"NCCL_DEBUG": "WARN"}}}, "belong to [nccl]"),
        ({"environment": {"variables": "A=1"}}, "NAME ="),
        ({"environment": {"variables": {"A": True}}}, "a text in quotes"),
        ({"environment": {"venv": "v", "container": ["c"]}}, "exclude each other"),
        ({"environment": {"modules": [""]}}, "empty text"),
        ({"environment": {"venv": "v"}, "scratch": {"environment_tar": "t"}}, "give one of the two"),
        ({"nccl": {"algorithm": "Tree"}}, "all_gather"),
    ],
)
def test_wrong_values_say_what_is_valid(tables, words):
    with pytest.raises(ConfigError) as caught:
        site(**tables)
    assert words in str(caught.value)
    assert caught.value.exit_code == 2


def test_numbers_may_be_variables():
    assert site(environment={"variables": {"A": 1}}).environment.variables == {"A": "1"}


def test_names_and_paths(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, partition in ((first, "one"), (second, "two")):
        folder.mkdir()
        (folder / "same.toml").write_text(f'[slurm]\npartition = "{partition}"\n')
    (second / "other.toml").write_text("")
    folders = [tmp_path / "none", first, second]
    assert load_site("same", folders).slurm.partition == "one"
    assert load_site("other", folders) == Site()
    assert load_site(str(second / "same.toml"), []).slurm.partition == "two"
    assert find_site("./x", folders) == Path("x")
    with pytest.raises(ConfigError, match=r"did you mean other\? known: other, same"):
        load_site("othr", folders)
    with pytest.raises(ConfigError, match="cannot read the site file"):
        load_site(str(tmp_path / "absent.toml"))


def test_an_error_names_the_file(tmp_path):
    (tmp_path / "bad.toml").write_text("[slurm]\ntime = 'x'\n")
    with pytest.raises(ConfigError, match=r"slurm.time = 'x' \(in the site file .*bad.toml\)"):
        load_site("bad", [tmp_path])


def test_the_users_own_sites_come_first(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    own = tmp_path / ".config" / "hpcinfer" / "sites"
    own.mkdir(parents=True)
    (own / "cpu.toml").write_text('[slurm]\npartition = "mine"\n')
    assert load_site("cpu").slurm.partition == "mine"
    assert site_folders()[0] == own
    assert load_site("no-requeue").slurm.requeue is False


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("2:30", 150), ("01:02:03", 3723), ("1-0", 86400), ("1-12", 129600), ("2-01:30", 178200), ("0-0:0:5", None)],
)
def test_time_limits(text, seconds):
    if seconds is None:
        with pytest.raises(ConfigError):
            site(slurm={"time": text})
    else:
        assert time_limit_s(site(slurm={"time": text}).slurm.time) == seconds
