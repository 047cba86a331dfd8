"""Figures of `bench overlap` from its runs: medians, speed-ups, what was aimed at, and a table for people."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from hpcinfer.bench.overlap_cases import Scenario

PP_AIM = 1.6
DIVIDED_AIM = 0.9
TWO_BATCH_AIM = 1.2
NO_LOSS_AIM = 0.98
COMMUNICATION_SHARE = (0.33, 0.47)
"""Of the undivided step: where the aim of two-batch overlap is meant to hold ("about 40 %")."""
PP_LEAST_TOKENS = 512


def report(figures: dict, asked: Sequence[Scenario], runs: Mapping[tuple[str, str], list[dict]]) -> None:
    """Add "results" and "aims" to the figures.

    Args:
        figures: options and what was found at the start.
        runs: (scenario, variant) -> one dict a repetition, in the order of the repetitions.
    """
    figures["results"] = results = []
    for scenario in asked:
        base = runs[scenario.name, scenario.variants[0].name]
        for variant in scenario.variants:
            mine = runs[scenario.name, variant.name]
            results.append({
                "scenario": scenario.name, "variant": variant.name, "sequences": variant.num_sequences,
                "in_flight": variant.lag, **_medians(mine), **_against(base, mine),
            })
    figures["aims"] = _aims(figures, results)


def _medians(runs: list[dict]) -> dict:
    """Medians over the repetitions."""
    counters, ranks = runs[0]["counters"], range(len(runs[0]["ranks"]))
    return {
        "tokens_per_s": statistics.median(run["tokens"] / run["seconds"] for run in runs),
        "seconds": statistics.median(run["seconds"] for run in runs),
        "tokens": runs[0]["tokens"],
        "leader_waited_share": statistics.median(run["leader_waited_s"] / run["seconds"] for run in runs),
        "divided_steps": runs[0]["divided_steps"],
        "max_in_flight": counters["max_in_flight"],
        "counters": counters,
        **{
            name: [statistics.median(run["ranks"][rank][name] for run in runs) for rank in ranks]
            for name in ("cpu_s", "progress_cpu_s")
        },
        "communicators": [
            {
                name: {
                    key: statistics.median(run["ranks"][rank]["communicators"][name][key] for run in runs)
                    for key in counters_of
                }
                for name, counters_of in runs[0]["ranks"][rank]["communicators"].items()
            }
            for rank in ranks
        ],
    }


def _against(base: list[dict], runs: list[dict]) -> dict:
    """Speed-up by medians, its range over the repetitions (pairs that ran one after the other), and equal tokens."""
    rates = [[run["tokens"] / run["seconds"] for run in group] for group in (base, runs)]
    pairs = [mine / other for other, mine in zip(*rates, strict=True)]
    both = [zip(first["output"], second["output"]) for first, second in zip(base, runs, strict=True)]
    same = [a == b for pair in both for first, second in pair for a, b in zip(first, second, strict=True)]
    return {
        "speedup": statistics.median(rates[1]) / statistics.median(rates[0]),
        "speedup_range": [min(pairs), max(pairs)],
        "equal_tokens": sum(same) / len(same),
    }


def _aims(figures: dict, results: list[dict]) -> list[dict]:
    by_name = {(result["scenario"], result["variant"]): result for result in results}
    aims = []

    def aim(what: str, wanted: float, got: float) -> None:
        aims.append({"aim": what, "wanted": round(wanted, 3), "got": round(got, 3), "met": got >= wanted})

    size = figures["sequences"]
    for (scenario, variant), result in by_name.items():
        if variant == "two-batch" and "prefill" in scenario:
            share = by_name[scenario, "off"]["leader_waited_share"]
            tokens = int(scenario.split()[-1])
            agreed = figures["agreed_two_batch_tokens"]
            if COMMUNICATION_SHARE[0] <= share <= COMMUNICATION_SHARE[1]:
                aim(f"{scenario}: two-batch, communication {share:.0%} of the step", TWO_BATCH_AIM, result["speedup"])
            if agreed and tokens >= agreed:
                aim(f"{scenario}: two-batch, on by agreement", NO_LOSS_AIM, result["speedup"])
        if variant == "2 in flight" and "prefill" in scenario and int(scenario.split()[-1]) >= PP_LEAST_TOKENS:
            aim(f"{scenario}: 2 in flight", PP_AIM, result["speedup"])
        if variant == "2 in flight" and scenario == f"pp2 decode {size} each":
            aim(f"{scenario}: 2 in flight", PP_AIM, result["speedup"])
        half = by_name.get((scenario, f"t({size // 2})"))
        if variant == "2 in flight" and half is not None:
            # A step of all sequences takes so many times as long as one of half of them.
            ratio = 2 * half["tokens_per_s"] / by_name[scenario, "1 in flight"]["tokens_per_s"]
            what = f"{scenario}: 2 in flight, of t({size}) / t({size // 2}) = {ratio:.2f}"
            aim(what, DIVIDED_AIM * ratio, result["speedup"])
    return aims


def table(figures: dict) -> str:
    """The figures for people.

    waited: share of the time in which the leader was blocked in communication. polling: share of the processor time
    that the thread took which moves transfers in the background.
    """
    link = figures["link_measured"]
    lines = [
        f"link: {figures['link_used']}",
        f"  measured {link['bytes_per_s'] / 1e6:.0f} MB/s one way, {link['both_ways_bytes_per_s'] / 1e6:.0f} MB/s "
        f"each way at once, {link['latency_s'] * 1e6:.0f} us",
        f"model: Llama-like, hidden {figures['hidden']}, {figures['layers']} layers, {figures['dtype']}, "
        f"{figures['threads_per_rank']} thread(s) a rank; load average {figures['load_average']:.1f} "
        f"to {figures['load_average_end']:.1f}",
    ]
    if "agreed_two_batch_tokens" in figures:
        agreed = figures["agreed_two_batch_tokens"]
        lines.append(f"two-batch overlap by agreement: {f'from {agreed} tokens on' if agreed else 'off'}")
    columns = (("tokens/s", 10), ("speed-up", 10), ("range", 14), ("waited", 9), ("cpu s", 8), ("polling", 9))
    lines += ["", f"{'scenario':<24}{'variant':<14}" + "".join(f"{name:>{width}}" for name, width in columns)]
    for result in figures["results"]:
        low, high = result["speedup_range"]
        lines.append(
            f"{result['scenario']:<24}{result['variant']:<14}{result['tokens_per_s']:>10.1f}{result['speedup']:>10.3f}"
            f"{f'{low:.2f}-{high:.2f}':>14}{result['leader_waited_share']:>9.1%}{sum(result['cpu_s']):>8.2f}"
            f"{sum(result['progress_cpu_s']) / sum(result['cpu_s']):>9.1%}"
        )
    lines.append("")
    lines += [
        f"{'met   ' if aim['met'] else 'MISSED'} {aim['aim']}: {aim['got']:.3f} (aim {aim['wanted']:.3f})"
        for aim in figures["aims"]
    ]
    return "\n".join(lines)
