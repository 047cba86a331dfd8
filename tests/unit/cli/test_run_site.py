"""The site: chosen before ranks are started, and passed on to them."""

from __future__ import annotations

import os

import pytest

import hpcinfer.launch.start
from hpcinfer.cli import main as cli
from tests.conftest import ROOT


class Started(Exception):
    """Raised in the place of becoming a launcher."""


@pytest.fixture
def started(monkeypatch):
    """The arguments with which ranks would have been started."""
    calls = []

    def start_ranks(num_ranks, argv, **settings):
        calls.append((num_ranks, settings))
        raise Started

    monkeypatch.setattr(hpcinfer.launch.start, "start_ranks", start_ranks)
    for name in ("HPCINFER_SITE", "NCCL_DEBUG", *(name for name in os.environ if name.startswith(("SLURM_", "PMI_")))):
        monkeypatch.setenv(name, "")  # so that it is put back to what it was
        monkeypatch.delenv(name)
    monkeypatch.chdir(ROOT)
    return calls


def test_ranks_get_the_sites_flavour_options_and_variables(started, tmp_path):
    path = tmp_path / "here.toml"
    path.write_text('[slurm]\nmpi = "pmix"\nsrun_options = ["--cpu-bind=cores"]\n[nccl]\ndebug = "WARN"\n')
    with pytest.raises(Started):
        cli.main(["run", "jobs/demo.toml", "--site", str(path)])
    assert started == [(2, {"mpi_flavour": "pmix", "srun_args": ("--cpu-bind=cores",)})]
    assert (os.environ["HPCINFER_SITE"], os.environ["NCCL_DEBUG"]) == (str(path), "WARN")


def test_without_a_site_nothing_is_said(started):
    with pytest.raises(Started):
        cli.main(["run", "jobs/demo.toml"])
    assert started == [(2, {"mpi_flavour": None, "srun_args": ()})]
    assert "HPCINFER_SITE" not in os.environ


def test_an_unknown_site_is_a_usage_error(started, capsys):
    assert cli.main(["run", "jobs/demo.toml", "--site", "nowhere"]) == 2
    assert "no site 'nowhere'" in capsys.readouterr().err
    assert not started


def test_the_doctor_is_started_as_the_ranks_would_be(started, tmp_path, monkeypatch):
    path = tmp_path / "here.toml"
    path.write_text('[slurm]\nmpi = "cray_shasta"\nsrun_options = ["--cpu-bind=cores"]\n[nccl]\ndebug = "WARN"\n')
    monkeypatch.setenv("HPCINFER_SITE", str(path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(Started):
        cli.main(["doctor", "jobs/demo.toml"])
    assert started == [(None, {"mpi_flavour": "cray_shasta", "srun_args": ("--cpu-bind=cores",)})]
    assert os.environ["NCCL_DEBUG"] == "WARN"
