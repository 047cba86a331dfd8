"""Figures of links: who is named, and against what."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from hpcinfer.doctor.finding import Level
from hpcinfer.doctor.network import NetworkFacts, judge_network
from hpcinfer.doctor.probes import LARGE_BYTES, MIDDLE_BYTES, PairFigures, _affordable, pair_rounds
from tests.doctor_facts import network, place


def nodes(rates: list[float], **changes) -> list[NetworkFacts]:
    """The ranks of as many nodes, each sending at its rate."""
    return [
        dataclasses.replace(network(rank, len(rates), out=rates[rank // 2]), **changes) for rank in range(2 * len(rates))
    ]


def between(facts, **settings):
    findings = [finding for finding in judge_network(facts, **settings) if finding.check == "links between nodes"]
    assert len(findings) == 1
    return findings[0]


@pytest.mark.parametrize("size", range(2, 10))
def test_everybody_meets_everybody_once(size):
    rounds = pair_rounds(size, 100)
    met = [pair for pairs in rounds for pair in pairs]
    assert sorted(met) == sorted(itertools.combinations(range(size), 2))
    for pairs in rounds:
        members = [member for pair in pairs for member in pair]
        assert len(members) == len(set(members))


def test_a_few_rounds_of_many():
    rounds = pair_rounds(40, 5)
    assert len(rounds) == 5
    partners = [{sum(pair) - 7 for pairs in rounds for pair in pairs if 7 in pair}]
    assert len(partners[0]) == 5


def test_large_transfers_are_cut_down_on_slow_links():
    assert _affordable(MIDDLE_BYTES / 1e9) == LARGE_BYTES
    assert _affordable(MIDDLE_BYTES / 5e6) == MIDDLE_BYTES


def test_of_two_nodes_the_slow_sender_is_named():
    finding = between(nodes([1e9, 20e9]))
    assert finding.level is Level.RED and finding.where == ("n0",) and "n0 sends at 1 GB/s" in finding.found


def test_a_node_that_receives_slowly():
    """What others send to node 2 is slow, what it sends is not."""
    facts = nodes([20e9] * 4)
    for index in (0, 2, 6):
        pairs = facts[index].between_pairs
        pairs = [dataclasses.replace(pair, bytes_per_s=2e9) if pair.peer == 2 else pair for pair in pairs]
        facts[index] = dataclasses.replace(facts[index], between_pairs=tuple(pairs))
    finding = between(facts)
    assert finding.level is Level.RED and finding.where == ("n2",) and "n2 receives at 2 GB/s" in finding.found


def test_half_as_fast_is_yellow():
    finding = between(nodes([20e9, 10e9, 20e9]))
    assert finding.level is Level.YELLOW and finding.where == ("n1",)
    assert between(nodes([20e9, 15e9, 20e9])).level is Level.GREEN


def test_links_that_do_not_use_the_fabric():
    finding = between(nodes([1e9] * 3), fabric_bytes_per_s=25e9)
    assert finding.level is Level.RED and "1 GB/s, where InfiniBand has 25 GB/s" in finding.found
    assert "UCX_TLS" in finding.fix
    # MPI moves host memory with one core: less is expected of it.
    assert between(nodes([4e9] * 3, transport="MPI"), fabric_bytes_per_s=25e9).level is Level.GREEN
    assert between(nodes([4e9] * 3, transport="NCCL"), fabric_bytes_per_s=25e9).level is Level.RED


def test_slow_networks_by_themselves():
    assert between(nodes([0.5e9] * 2)).level is Level.GREEN
    finding = between(nodes([0.5e9] * 2), replica_spans_nodes=True)
    assert finding.level is Level.YELLOW and "splits a replica over nodes" in finding.found and "500 MB/s" in finding.found
    assert "less than Gigabit Ethernet" in between(nodes([10e6] * 2)).found


def test_a_late_node():
    facts = nodes([20e9] * 3)
    pairs = tuple(dataclasses.replace(pair, latency_s=500e-6) for pair in facts[2].between_pairs)
    facts[2] = dataclasses.replace(facts[2], between_pairs=pairs)
    late = [finding for finding in judge_network(facts) if finding.level is not Level.GREEN]
    assert [(finding.check, finding.level, finding.where) for finding in late] == [
        ("latency between nodes", Level.YELLOW, ("n1",))
    ]
    assert "n1 500 us; the median is 3 us" in late[0].found


def test_a_node_that_is_slow_inside():
    facts = nodes([20e9] * 3)
    for index in (4, 5):
        facts[index] = dataclasses.replace(facts[index], inside=dataclasses.replace(facts[index].inside, bytes_per_s=20e9))
    finding = judge_network(facts)[0]
    assert finding.check == "links inside nodes" and finding.level is Level.RED and finding.where == ("n2",)


def test_one_rank_has_no_links():
    findings = judge_network([NetworkFacts(place=place(0), transport="MPI")])
    assert [str(finding.level) for finding in findings] == ["not here", "not here"]


def test_figures_are_told():
    facts = nodes([20e9, 20e9])
    inside, outside = judge_network(facts)
    assert inside.found == "NCCL: all-reduce 2 us, 200 GB/s; send and recv 1 us, 300 GB/s"
    assert outside.found == "NCCL: all-reduce 5 us, 18 GB/s; send and recv 3 us, 20 GB/s"
    assert isinstance(facts[0].between_pairs[0], PairFigures)
