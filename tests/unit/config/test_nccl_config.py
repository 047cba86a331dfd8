"""Settings of NCCL: what is refused, and that what is written means to NCCL what was asked for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.config.load import from_tables
from hpcinfer.config.nccl import ALGORITHMS, FUNCTIONS, PROTOCOLS, NcclSection, PerFunction, chosen, nccl_variables
from hpcinfer.errors import ConfigError


def section(**keys) -> NcclSection:
    return from_tables(NcclSection, keys, "the section")


def test_what_is_left_out_is_left_to_nccl():
    assert nccl_variables(NcclSection()) == {}


def test_every_key_has_its_variable():
    everything = section(
        interface="=ib0,ib1", hca="^=mlx5_2:1", gdr_level="phb", protocol="ll128,Simple", min_channels=2, max_channels=4,
        algorithm={"default": "ring", "all_reduce": "tree,collnetchain", "reduce_scatter": "^pat"}, buffer_size="2 MiB", collnet=True,
        debug="info", debug_subsys="init, ^net", extra={"NCCL_IB_TIMEOUT": 22},
    )  # fmt: skip
    assert nccl_variables(everything) == {
        "NCCL_SOCKET_IFNAME": "=ib0,ib1", "NCCL_IB_HCA": "^=mlx5_2:1", "NCCL_NET_GDR_LEVEL": "PHB", "NCCL_PROTO": "LL128,Simple",
        "NCCL_ALGO": "Ring;allreduce:Tree,CollNetChain;reducescatter:^PAT", "NCCL_MIN_NCHANNELS": "2", "NCCL_MAX_NCHANNELS": "4",
        "NCCL_BUFFSIZE": "2097152", "NCCL_COLLNET_ENABLE": "1", "NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,^NET",
        "NCCL_IB_TIMEOUT": "22",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"interface": "eth0,=eth1"}, "only before the first"),
        ({"interface": "eth0 eth1"}, "separated by commas"),
        ({"hca": "mlx5_0:one"}, "=mlx5_0:1"),
        ({"gdr_level": "PXX"}, "did you mean PXB"),
        ({"gdr_level": "2"}, "LOC, PIX, PXB, PHB, SYS"),
        ({"protocol": "LL127"}, "did you mean LL128"),
        ({"algorithm": "Trees"}, "did you mean Tree"),
        ({"algorithm": "Tree"}, "all_gather has Ring, CollNetDirect, NVLS, PAT"),
        ({"algorithm": "^Ring"}, "broadcast has Ring"),
        ({"algorithm": {"all_gather": "Ring,Tree"}}, "there is no Tree all_gather"),
        ({"algorithm": {"all_reduce": "PAT"}}, "there is no PAT all_reduce"),
        ({"algorithm": {"allreduce": "Ring"}}, "did you mean all_reduce"),
        ({"algorithm": {"all_reduce": "CollNetDirect"}}, "nccl.collnet = true"),
        ({"algorithm": {"all_reduce": "NVLS"}, "protocol": "LL128"}, "only Ring and Tree have LL and LL128"),
        ({"protocol": "^LL,LL128,Simple"}, "leaves nothing"),
        ({"algorithm": {"all_reduce": 3}}, "valid: Ring"),
        ({"min_channels": 8, "max_channels": 4}, "above nccl.max_channels"),
        ({"max_channels": 65}, "1 to 64"),
        ({"buffer_size": "lots"}, "not a size"),
        ({"debug": "verbose"}, "VERSION, WARN, INFO, TRACE"),
        ({"debug_subsys": "NET"}, 'set nccl.debug = "INFO"'),
        ({"debug": "INFO", "debug_subsys": "NETT"}, "did you mean NET"),
        ({"extra": {"NCCL_ALGO": "Ring"}}, "nccl.algorithm"),
        ({"extra": {"UCX_TLS": "rc"}}, "begin with NCCL_"),
        ({"extra": {"NCCL_X": "a\nb"}}, "line breaks"),
        ({"hcas": "x"}, "did you mean hca"),
    ],
)
def test_what_nccl_would_misread_is_refused(keys, words):
    with pytest.raises(ConfigError) as caught:
        section(**keys)
    assert words in str(caught.value)


def read_as_nccl(text: str, names: tuple[str, ...]) -> dict[str, set[str]]:
    """How NCCL 2.24 and newer read NCCL_ALGO and NCCL_PROTO, from the description in its documentation: entries separated by ;, all
    but the first with a function and a colon; a list that begins with ^ is of what is excluded; what no entry names has all.
    """
    allowed = {function.replace("_", ""): {name.lower() for name in names} for function in FUNCTIONS}
    for index, entry in enumerate(text.split(";") if text else []):
        function, colon, listed = entry.rpartition(":")
        assert colon or index == 0
        selected = set(listed.removeprefix("^").lower().split(","))
        assert selected <= {name.lower() for name in names}
        if listed.startswith("^"):
            selected = {name.lower() for name in names} - selected
        for known in allowed:
            if not function or known == function.lower():
                allowed[known] = selected
    return allowed


def lists(names):
    some = st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True).map(",".join)
    return st.just("") | some | some.map(lambda text: f"^{text}")


tables = {
    key: st.builds(PerFunction, default=lists(names), **{function: lists(names) for function in FUNCTIONS})
    for key, names in (("algorithm", ALGORITHMS), ("protocol", PROTOCOLS))
}


@given(algorithm=tables["algorithm"] | st.just(PerFunction()), protocol=tables["protocol"], collnet=st.booleans())
def test_what_is_accepted_means_the_same_to_nccl(algorithm, protocol, collnet):
    """And it leaves every function with an algorithm that serves it (in the tuning model: broadcast and reduce have only Ring)."""
    try:
        settings = NcclSection(algorithm=algorithm, protocol=protocol, collnet=collnet)
    except ConfigError as error:
        assert error.fix
        return
    variables = nccl_variables(settings)
    algorithms = read_as_nccl(variables.get("NCCL_ALGO", ""), ALGORITHMS)
    protocols = read_as_nccl(variables.get("NCCL_PROTO", ""), PROTOCOLS)
    for function in FUNCTIONS:
        word = function.replace("_", "")
        assert algorithms[word] == {name.lower() for name in chosen(algorithm.of(function), ALGORITHMS)}
        assert protocols[word] == {name.lower() for name in chosen(protocol.of(function), PROTOCOLS)}
        assert protocols[word]
    for word in ("broadcast", "reduce"):
        assert "ring" in algorithms[word]
    for word in ("allgather", "reducescatter"):
        assert algorithms[word] & {"ring", "collnetdirect", "nvls", "pat"}
    assert algorithms["allreduce"] - {"pat"}


@given(value=st.text(max_size=12), key=st.sampled_from(["interface", "hca", "gdr_level", "protocol", "algorithm", "debug", "debug_subsys"]))
def test_nothing_but_our_errors_comes_out(key, value):
    try:
        variables = nccl_variables(section(**{key: value}))
    except ConfigError:
        return
    assert all(text.isprintable() and " " not in text for text in variables.values())
