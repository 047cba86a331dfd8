"""A site's variables, and the user's, which win."""

from __future__ import annotations

import dataclasses
import json

import pytest

from hpcinfer.config.load import from_tables
from hpcinfer.config.site import Site
from hpcinfer.errors import ConfigError
from hpcinfer.launch.site import SITE_VARIABLE, apply_site, chosen_site, site_variables

SITE = from_tables(
    Site, {"environment": {"variables": {"UCX_TLS": "rc", "FI_PROVIDER": "cxi"}}, "nccl": {"debug": "WARN", "hca": "mlx5"}}, "the site"
)
WANTED = {"UCX_TLS": "rc", "FI_PROVIDER": "cxi", "NCCL_DEBUG": "WARN", "NCCL_IB_HCA": "mlx5"}


def test_without_a_site_only_the_users_nccl_variables_are_recorded():
    variables = site_variables("", None, {"NCCL_ALGO": "Ring", "HOME": "/root"})
    assert (variables.site, variables.from_site, variables.from_user) == ("", {}, {"NCCL_ALGO": "Ring"})


def test_the_user_wins_and_is_recorded():
    environ = {"NCCL_DEBUG": "INFO", "NCCL_ALGO": "Ring", "UCX_TLS": "tcp", "HOME": "/root"}
    variables = site_variables("here", SITE, environ)
    assert variables.from_site == {"FI_PROVIDER": "cxi", "NCCL_IB_HCA": "mlx5"}
    assert variables.from_user == {"NCCL_DEBUG": "INFO", "NCCL_ALGO": "Ring", "UCX_TLS": "tcp"}
    json.dumps(dataclasses.asdict(variables))


def test_a_value_that_a_parent_process_has_set_is_the_sites():
    assert site_variables("here", SITE, WANTED).from_site == WANTED
    assert site_variables("here", SITE, WANTED).from_user == {}


def test_an_empty_value_of_the_user_counts():
    assert site_variables("here", SITE, {"NCCL_DEBUG": ""}).from_user == {"NCCL_DEBUG": ""}


def test_it_is_applied_once_and_ranks_inherit_it(tmp_path):
    path = tmp_path / "here.toml"
    path.write_text('[nccl]\ndebug = "WARN"\n[environment.variables]\nUCX_TLS = "rc"\n')
    environ = {"UCX_TLS": "tcp"}
    site, variables = apply_site(str(path), environ)
    assert site.nccl.debug == "WARN"
    assert environ == {"UCX_TLS": "tcp", "NCCL_DEBUG": "WARN", SITE_VARIABLE: str(path)}
    again, variables_again = apply_site("", environ)
    assert (again, variables_again) == (site, variables)


def test_the_option_comes_before_the_variable(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.toml").write_text(f'[slurm]\npartition = "{name}"\n')
    environ = {SITE_VARIABLE: str(tmp_path / "a.toml")}
    assert chosen_site("", environ)[1].slurm.partition == "a"
    assert chosen_site(str(tmp_path / "b.toml"), environ)[1].slurm.partition == "b"
    assert chosen_site("", {}) == ("", None)
    with pytest.raises(ConfigError, match="no site 'nowhere'"):
        chosen_site("nowhere", environ)
