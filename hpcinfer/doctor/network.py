"""Transfers inside and between nodes, and the node that is slower than the others."""

from __future__ import annotations

import collections
import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from hpcinfer.comm.bootstrap import World, split
from hpcinfer.doctor.finding import Finding, RankPlace, absent, green, hosts, red, yellow
from hpcinfer.doctor.probes import PairFigures, ReduceFigures, measure_all_reduce, measure_pair, pair_rounds

SLOW, SLOWISH = 1 / 3, 0.6
"""Shares of the median below which a node is red, and yellow. On shared switches figures differ by tens of percent."""
LATE = 5.0
"""Times the median latency."""
_LATE_S = 100e-6
FABRIC_SHARE = {"NCCL": 0.3, "MPI": 0.08}
"""Of the rate of the InfiniBand ports: below it, transfers do not use them. MPI's are moved by one core of the host."""
MODEST_BYTES_PER_S = 1e9
"""Below it, layers that are split over nodes wait for the network most of the time."""
POOR_BYTES_PER_S = 60e6
"""Half of what Gigabit Ethernet has."""
_MOST_ROUNDS = 5
_MOST_PEERS = 7


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NetworkFacts:
    """What one rank measured."""

    place: RankPlace
    transport: str
    """NCCL or MPI."""
    inside: ReduceFigures | None = None
    """Among the ranks of its node; None where it is alone there."""
    inside_pairs: tuple[PairFigures, ...] = ()
    """From it to others of its node, by local rank."""
    between: ReduceFigures | None = None
    """Among the first ranks of all nodes; None on others, and on one node."""
    between_pairs: tuple[PairFigures, ...] = ()
    """From it to the first ranks of other nodes, by number of the node."""


def gather_network(world: World, places: Sequence[RankPlace]) -> NetworkFacts:
    """Measure, all nodes at once. Collective; making communicators has no deadline, so that all ranks must be known to come.

    Args:
        places: of all ranks, in rank order.
    """
    place = places[world.rank]
    facts = NetworkFacts(place=place, transport="MPI" if world.nccl is None else "NCCL")
    if world.size == 1:
        return facts
    inside = split(world, [each.rank for each in places if each.node == place.node], "node")
    firsts = [each.rank for each in places if each.local_rank == 0]
    between = split(world, firsts if place.local_rank == 0 else None, "nodes")
    if inside.size > 1:
        inside.warmup()
        figures = measure_all_reduce(inside)
        pairs = [
            measure_pair(inside, peer if inside.rank == 0 else 0)
            for peer in range(1, min(inside.size, _MOST_PEERS + 1)) if inside.rank in (0, peer)
        ]
        facts = dataclasses.replace(facts, inside=figures, inside_pairs=tuple(pairs))
    world.channel.barrier()
    if between is not None and between.size > 1:
        between.warmup()
        figures = measure_all_reduce(between)
        pairs = [
            measure_pair(between, sum(pair) - between.rank)
            for pairs in pair_rounds(between.size, _MOST_ROUNDS) for pair in pairs if between.rank in pair
        ]
        facts = dataclasses.replace(facts, between=figures, between_pairs=tuple(pairs))
    world.channel.barrier()
    for comm in (inside, between):
        if comm is not None:
            comm.close()
    return facts


def judge_network(
    facts: Sequence[NetworkFacts], *, fabric_bytes_per_s: float = 0.0, replica_spans_nodes: bool = False
) -> list[Finding]:
    """Figures of all ranks.

    Args:
        fabric_bytes_per_s: of the fastest InfiniBand port; 0 without any.
        replica_spans_nodes: the job's layout splits a replica over nodes.
    """
    firsts = [each for each in facts if each.place.local_rank == 0]
    return [*_judge_inside(firsts), *_judge_between(firsts, fabric_bytes_per_s, replica_spans_nodes)]


def _judge_inside(firsts: list[NetworkFacts]) -> list[Finding]:
    measured = [each for each in firsts if each.inside is not None]
    if not measured:
        return [absent("links inside nodes", "one rank a node")]
    rates = {each.place: each.inside.bytes_per_s for each in measured}
    pairs = [pair for each in measured for pair in each.inside_pairs]
    text = _text(measured[0].transport, [each.inside for each in measured], pairs)
    findings = _slow_nodes("links inside nodes", rates, "all-reduces", text) or [green("links inside nodes", text)]
    return findings + _late_nodes("latency inside nodes", {each.place: each.inside.latency_s for each in measured})


def _judge_between(firsts: list[NetworkFacts], fabric_bytes_per_s: float, spans: bool) -> list[Finding]:
    measured = [each for each in firsts if each.between is not None]
    if not measured:
        return [absent("links between nodes", "one node")]
    sent = {each.place: max(pair.bytes_per_s for pair in each.between_pairs) for each in measured}
    came = _received(measured)
    name = "links between nodes"
    pairs = [pair for each in measured for pair in each.between_pairs]
    text = _text(measured[0].transport, [each.between for each in measured], pairs)
    findings = _slow_nodes(name, sent, "sends", text)
    if len(measured) > 2:  # of two nodes, the one that receives slowly is the one that is sent to slowly
        named = {place for finding in findings for place in finding.where}
        findings += [each for each in _slow_nodes(name, came, "receives", text) if not named & set(each.where)]
    usual = statistics.median_high(sent.values())
    share = FABRIC_SHARE[measured[0].transport]
    if usual < share * fabric_bytes_per_s:
        findings.append(red(
            name, f"{_rate(usual)}, where InfiniBand has {_rate(fabric_bytes_per_s)}: {text}",
            "transfers do not use it: NCCL_IB_HCA and NCCL_SOCKET_IFNAME for NCCL (NCCL_DEBUG=INFO says what it took), "
            "UCX_TLS and UCX_NET_DEVICES for MPI",
        ))
    elif spans and usual < MODEST_BYTES_PER_S and not findings:
        findings.append(yellow(
            name, f"{text}, and this layout splits a replica over nodes",
            "keep tp * sp * pp within the ranks of a node, or split over nodes by pp alone",
        ))
    elif usual < POOR_BYTES_PER_S and not findings:
        findings.append(yellow(
            name, f"{text}: less than Gigabit Ethernet",
            "look at what MPI took, perhaps a management network (UCX_NET_DEVICES, UCX_TLS), and at the switch between them",
        ))
    latencies = {each.place: min(pair.latency_s for pair in each.between_pairs) for each in measured}
    return (findings or [green(name, text)]) + _late_nodes("latency between nodes", latencies)


def _received(measured: Sequence[NetworkFacts]) -> dict[RankPlace, float]:
    """The best rate at which others sent to each node."""
    best: dict[int, float] = collections.defaultdict(float)
    for each in measured:
        for pair in each.between_pairs:
            best[pair.peer] = max(best[pair.peer], pair.bytes_per_s)
    return {each.place: best[index] for index, each in enumerate(measured)}


def _slow_nodes(check: str, rates: Mapping[RankPlace, float], verb: str, text: str) -> list[Finding]:
    """A finding for nodes far below the median. The upper of two medians: of two nodes the slower one is to be named."""
    usual = statistics.median_high(rates.values())
    findings = []
    for make, above, below in ((red, 0.0, SLOW), (yellow, SLOW, SLOWISH)):
        slow = {place: rate for place, rate in rates.items() if above * usual <= rate < below * usual}
        if slow:
            each = ", ".join(f"{place.host} {verb} at {_rate(rate)}" for place, rate in list(slow.items())[:8])
            findings.append(make(
                check, f"{each}; the median of {len(rates)} nodes is {_rate(usual)} ({text})",
                "look at its link, cable and other jobs there (ibstat, ethtool, top), or leave it out: sbatch "
                f"--exclude={','.join(hosts(slow))}",
                slow,
            ))
    return findings


def _late_nodes(check: str, latencies: Mapping[RankPlace, float]) -> list[Finding]:
    usual = statistics.median_low(latencies.values())
    late = {place: latency for place, latency in latencies.items() if latency > max(LATE * usual, usual + _LATE_S)}
    if not late:
        return []
    return [yellow(
        check,
        f"{', '.join(f'{place.host} {_time(latency)}' for place, latency in late.items())}; the median is {_time(usual)}",
        "look at what else runs there (top), at power saving of CPU and NIC, and at its link", late,
    )]


def _text(transport: str, reductions: Sequence[ReduceFigures], pairs: Sequence[PairFigures]) -> str:
    def middle(figures: Sequence[ReduceFigures] | Sequence[PairFigures]) -> str:
        latency_s = statistics.median(each.latency_s for each in figures)
        return f"{_time(latency_s)}, {_rate(statistics.median(each.bytes_per_s for each in figures))}"

    return f"{transport}: all-reduce {middle(reductions)}; send and recv {middle(pairs)}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 10e-3 else f"{seconds * 1e3:.0f} ms"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.3g} GB/s" if bytes_per_s >= 1e9 else f"{bytes_per_s / 1e6:.3g} MB/s"
