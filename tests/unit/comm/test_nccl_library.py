"""NCCL's settings, versions and absence."""

from __future__ import annotations

import sys
import types

import pytest

from hpcinfer.comm.host import LocalHostChannel
from hpcinfer.comm.nccl_library import apply_settings, check_versions, load_nccl, version_text
from hpcinfer.errors import ConfigError, LaunchError


@pytest.fixture
def environ(monkeypatch):
    """An environment without NCCL_* to begin with."""
    import os

    clean = {name: value for name, value in os.environ.items() if not name.startswith("NCCL_")}
    monkeypatch.setattr(os, "environ", clean)
    return clean


def test_what_the_user_exported_stands(environ):
    environ["NCCL_PROTO"] = "Simple"
    in_force = apply_settings()
    assert in_force == {"NCCL_LAUNCH_ORDER_IMPLICIT": "1", "NCCL_PROTO": "Simple"}
    environ["NCCL_LAUNCH_ORDER_IMPLICIT"] = "0"
    assert apply_settings()["NCCL_LAUNCH_ORDER_IMPLICIT"] == "0"
    in_force = apply_settings()
    assert {name: environ[name] for name in in_force} == in_force


def test_ranks_that_share_a_gpu_pretend_to_be_hosts(environ):
    first = apply_settings(share_gpu_rank=3)
    assert first["NCCL_HOSTID"] == "rank3" and first["NCCL_MULTI_RANK_GPU_ENABLE"] == "1"


@pytest.mark.parametrize(("number", "text"), [(22809, "2.28.9"), (23203, "2.32.3"), (21805, "2.18.5")])
def test_versions_in_words(number, text):
    assert version_text(number) == text


def test_different_versions_are_an_error_of_all_ranks():
    library = types.SimpleNamespace(get_version=lambda: 22809)

    class Channel(LocalHostChannel):
        def all_gather(self, obj, *, deadline_s=None):
            return [obj, "2.27.3", obj]

    with pytest.raises(LaunchError, match="2.28.9 on ranks 0, 2; 2.27.3 on ranks 1") as raised:
        check_versions(library, Channel())
    assert raised.value.agreed
    assert check_versions(library, LocalHostChannel()) == "2.28.9"


def test_without_cupy_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ConfigError, match="cuda13"):
        load_nccl()
    cupy = types.ModuleType("cupy")
    cuda = types.ModuleType("cupy.cuda")
    cuda.nccl = types.SimpleNamespace(available=False)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    with pytest.raises(ConfigError, match="no NCCL library"):
        load_nccl()
    cuda.nccl.available = True
    assert load_nccl() is cuda.nccl
