"""Counts, bytes and order of what ranks do, from the records of real runs in many layouts; and wrong schedules, which
the same assertions find.

All cases run in one world of MPI ranks with strict communicators; what each rank recorded is looked at here.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import pickle
import re

import numpy as np
import pytest

from hpcinfer.batch import MicroBatch, Step
from hpcinfer.config.model import ModelConfig
from tests.checkpoints import make_variant
from tests.mpi import run_ranks
from tests.ranks import counts
from tests.ranks.counts import Expected, Part, Stage
from tests.ranks.order_rules import RULES, RuleBroken, broken_rules
from tests.ranks.records import RankRecords, lane_ranks

NUM_RANKS = 4
# Pages for half of the tokens of all rows together: sequences are preempted and prefilled again.
ENGINE = {"block_size": 4, "max_batch_tokens": 16, "max_sequences": 8, "max_context": 44}
NUM_BLOCKS = 12
PROMPT_LENS = (1, 22, 12, 5, 17)
MAX_TOKENS = 7
EQUAL_LENS = (4, 4, 4, 4)
"""For schedules that are wrong without a hang: all rows fit one step, and its parts, like those of all later ones, have
the same size."""
LEAST_DECODE_STEPS = 5
OFF, ON = {"two_batch": "off"}, {"two_batch": "2"}
LANES = {"sp_min_tokens": 10}
CONTROL_BYTES = 8192

RIGHT: dict[str, tuple[str, int, dict]] = {
    "llama tp2": ("llama", 2, {"tp": 2, **OFF}),
    "llama tp2 sequence form": ("llama", 2, {"tp": 2, "sequence_form": True, **OFF}),
    "llama tp2 two-batch": ("llama", 2, {"tp": 2, **ON}),
    "llama pp2": ("llama", 2, {"pp": 2, **OFF}),
    "llama tp2 x pp2": ("llama", 4, {"tp": 2, "pp": 2, **OFF}),
    "llama tp2 x pp2 sequence form two-batch": ("llama", 4, {"tp": 2, "pp": 2, "sequence_form": True, **ON}),
    "llama sp2": ("llama", 2, {"sp": 2, **LANES, **OFF}),
    "llama sp2 x tp2": ("llama", 4, {"sp": 2, "tp": 2, **LANES, **OFF}),
    "llama pp2 x sp2 two-batch": ("llama", 4, {"pp": 2, "sp": 2, **LANES, **ON}),
    "gpt2 tp2": ("gpt2", 2, {"tp": 2, **OFF}),
    "gpt2 tp2 x pp2": ("gpt2", 4, {"tp": 2, "pp": 2, **OFF}),
    "mixtral tp2": ("mixtral", 2, {"tp": 2, **OFF}),
    "mixtral tp2 ep2": ("mixtral", 2, {"tp": 2, "ep": 2, **OFF}),
    "mixtral sp2 ep2": ("mixtral", 2, {"sp": 2, "ep": 2, **LANES, **OFF}),
    "mixtral sp2 x tp2 ep4": ("mixtral", 4, {"sp": 2, "tp": 2, "ep": 4, **LANES, **OFF}),
    "qwen3-moe sp2 x tp2 ep4 sequence form two-batch": (
        "qwen3-moe", 4, {"sp": 2, "tp": 2, "ep": 4, "sequence_form": True, **LANES, **ON},
    ),
}
ASKED = {"logprobs": 2, "prompt_logprobs": 1}
ASKING = ("llama tp2 two-batch", "llama tp2 x pp2 sequence form two-batch", "llama pp2 x sp2 two-batch")
"""The cases whose rows ask for log-probabilities too."""
# name -> (checkpoint, ranks, layout, lengths of prompts, rules that must be broken)
WRONG: dict[str, tuple[str, int, dict, tuple[int, ...], set[str]]] = {
    "second part first": ("llama", 2, {"tp": 2, **ON}, PROMPT_LENS, {"written before read"}),
    "second part first on last rank": (
        "llama", 2, {"tp": 2, **ON}, EQUAL_LENS, {"same collectives"},
    ),
    "made up tokens": ("llama", 2, {"pp": 2, **OFF}, PROMPT_LENS, {"token before next step"}),
    "gather in decode": ("mixtral", 2, {"sp": 2, "ep": 2, **LANES, **OFF}, PROMPT_LENS, {"no sp in decode"}),
}
AUTO = "auto"
GAINS = (32, 64)
"""The smallest step that gains by being divided, as rank 0 and rank 1 measure it; the largest step has 64 tokens."""


def make_case(model, ranks, layout, lens=PROMPT_LENS, *, wrong="", num_blocks=NUM_BLOCKS, gains=(), asked=None, **engine) -> dict:
    generator = np.random.default_rng(3)
    rows = [{"prompt": generator.integers(3, 200, n).tolist(), "max_tokens": MAX_TOKENS, **(asked or {})} for n in lens]
    return {
        "model": model, "ranks": ranks, "layout": layout, "rows": rows, "wrong": wrong, "num_blocks": num_blocks,
        "gains": gains, "engine": {**ENGINE, **engine},
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Checkpoint -> its folder."""
    folder = tmp_path_factory.mktemp("models")
    names = {variant for variant, *_ in [*RIGHT.values(), *WRONG.values()]}
    return {name: str(make_variant(folder / name, name)) for name in sorted(names)}


@pytest.fixture(scope="module")
def configs(models) -> dict[str, ModelConfig]:
    return {name: ModelConfig.from_folder(folder) for name, folder in models.items()}


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory) -> dict[str, list[RankRecords]]:
    """Case -> what its ranks recorded, in the order of ranks."""
    folder = tmp_path_factory.mktemp("records")
    cases = {
        name: make_case(models[variant], *rest, asked=ASKED if name in ASKING else None) for name, (variant, *rest) in RIGHT.items()
    }
    for name, (variant, ranks, layout, lens, _) in WRONG.items():
        # No preemption: a wrong schedule shall not be blamed for what follows from another one's pages.
        cases[name] = make_case(models[variant], ranks, layout, lens, wrong=name, num_blocks=64)
    cases[AUTO] = make_case(
        models["llama"], 2, {"tp": 2, "two_batch": "auto"}, (70, 29, 5), gains=GAINS, num_blocks=64,
        max_batch_tokens=max(GAINS), max_context=128,
    )
    (folder / "cases.json").write_text(json.dumps(list(cases.values())))
    run_ranks(NUM_RANKS, ["tests/ranks/records_rank.py", folder / "cases.json", folder], timeout_s=200).check()
    return {
        name: [pickle.loads((folder / f"{number}-{rank}.pkl").read_bytes()) for rank in range(case["ranks"])]
        for number, (name, case) in enumerate(cases.items())
    }


# -- counts and bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RIGHT)
def test_operations_equal_the_formulas(name, runs, configs):
    """Every microbatch on every rank: number, verbs and bytes on every axis, prefill and decode."""
    variant, _, layout = RIGHT[name]
    sent, returned = collections.Counter(), collections.Counter()
    for rank in runs[name]:
        stage = stage_of(configs[variant], rank, layout)
        found = operations_of(rank)
        seen = collections.Counter()
        for part in rank.parts():
            assert found.pop((part.tick, part.part), {}) == expected_of(stage, part), (rank.mesh.rank, part)
            seen[part.is_prefill] += 1
            if stage.ep_spans_lanes and part.is_prefill:
                check_routed(stage, rank, part, sent, returned)
        assert not found, "operations of no microbatch"
        assert any(part.reading is not None for part in rank.parts()) == (name in ASKING)
        assert seen[True] and seen[False] >= LEAST_DECODE_STEPS
    assert sent == returned, "every token that went to an expert came back"
    assert bool(sent) == (layout.get("sp", 1) > 1 and layout.get("ep", 1) > 1)


def stage_of(config: ModelConfig, rank: RankRecords, layout: dict) -> Stage:
    mesh = rank.mesh
    return Stage.of(
        config, rank.layers, tp=mesh.tp, sp=mesh.sp, ep=mesh.ep, sequence_form=layout.get("sequence_form", False)
    )


def expected_of(stage: Stage, part: MicroBatch) -> dict[tuple, int]:
    """(axis, verb, what, bytes) -> count, by the formulas."""
    facts = Part(
        tokens=part.num_tokens, lane_tokens=part.lane_tokens, shared_lens=part.shared_lens,
        draws=int(part.samples.sum()), is_prefill=part.is_prefill,
        scored=0 if part.reading is None else int((part.reading.targets >= 0).sum()), scored_top=ASKED["prompt_logprobs"],
    )
    return {(e.axis, e.verb, e.what, e.bytes): e.count for e in counts.operations(stage, facts)}


def operations_of(rank: RankRecords) -> dict[tuple[int, int], dict[tuple, int]]:
    """(tick, part) -> (axis, verb, what, bytes) -> count, of all that belongs to a microbatch."""
    prefill = {(part.tick, part.part): part.is_prefill for part in rank.parts()}
    found: dict[tuple[int, int], dict[tuple, int]] = collections.defaultdict(collections.Counter)
    for record in rank.transfers():
        if record.track != "control" and not record.track.startswith("tokens"):
            key, what = (record.tick, record.part), re.sub(r"^layer \d+ ", "", record.name)
            routed = what in counts.ROUTED and prefill.get(key)
            found[key][record.track.split()[0], record.verb, what, None if routed else record.bytes] += 1
    return {key: dict(counter) for key, counter in found.items()}


def check_routed(stage: Stage, rank: RankRecords, part: MicroBatch, sent, returned) -> None:
    """A token goes to at least one rank, and at most to as many as it has experts. Adds to `sent` and `returned`: rows
    by microbatch and layer."""
    own = counts.own_share(stage, part.num_tokens, rank.mesh.tp_rank)
    for record in rank.transfers("ep"):
        if (record.tick, record.part) == (part.tick, part.part) and record.name.endswith("dispatch"):
            rows, rest = divmod(record.bytes, counts.packed_bytes(stage))
            assert rest == 0 and own <= rows <= own * min(stage.experts_per_token, stage.ep)
            sent[record.tick, record.part, record.name.split()[1]] += rows
        elif (record.tick, record.part) == (part.tick, part.part) and record.name.endswith("combine"):
            assert record.bytes % (stage.hidden * stage.number_bytes) == 0
            rows = record.bytes // (stage.hidden * stage.number_bytes)
            returned[record.tick, record.part, record.name.split()[1]] += rows


@pytest.mark.parametrize("name", RIGHT)
def test_tokens_and_control_of_a_step(name, runs):
    """A broadcast of 8 KiB a tick to all ranks; 8 bytes a drawn token from each sampler that is not the leader, and behind them
    4 + 8k bytes for each log-probability that is wanted, with those of k other tokens."""
    ranks = runs[name]
    for rank in ranks:
        controls = [(r.tick, r.verb, r.bytes) for r in rank.transfers("control") if r.tick in rank.steps]
        assert controls == [(tick, "broadcast", CONTROL_BYTES) for tick in sorted(rank.steps)]
    leader = ranks[0]
    for sampler in {rank.mesh.sampler for rank in ranks} - {leader.mesh.rank}:
        lane = ranks[sampler].mesh.lane
        expected = [
            (tick, num_bytes) for tick, step in sorted(leader.steps.items()) for num_bytes in returned_bytes(step, lane) if num_bytes
        ]
        link = "tokens" if leader.mesh.sp == 1 else f"tokens {lane}"
        assert expected
        for rank, verb in ((leader, "recv"), (ranks[sampler], "send")):
            assert [(r.tick, r.bytes) for r in rank.transfers(link)] == expected
            assert {r.verb for r in rank.transfers(link)} == {verb}


def returned_bytes(step: Step, lane: int) -> tuple[int, int, int]:
    """Of the tokens that a lane draws, of their log-probabilities, and of those of prompts."""
    asked, scored = (lanes[lane] if lanes else () for lanes in (step.asked, step.scored))
    return (
        8 * len(step.drawing[lane]), len(asked) * (4 + 8 * ASKED["logprobs"]),
        sum(span.num_tokens for span in scored) * (4 + 8 * ASKED["prompt_logprobs"]),
    )


@pytest.mark.parametrize("name", [name for name in RIGHT if "sequence form" not in name])
def test_attention_gathers_nothing_over_tp(name, runs):
    """Between the norm before attention and the reduction after its output projection no tp rank hears of another."""
    for rank in runs[name]:
        names = {r.name for r in rank.transfers("tp") if r.verb != "all_reduce"}
        assert names <= {"logits", "logprobs"} | {n for n in names if n.endswith(" shares")}


LLAMA = Stage(
    layers=36, mixtures=0, hidden=4096, vocab=128, kv_heads=4, head_dim=128, experts_per_token=0, number_bytes=2,
    tp=2, sp=1, ep=1, sequence_form=False, is_first=True, is_last=True,
)


def test_the_formulas_by_hand():
    """36 layers under tp: 72 + 1 all-reduces and a gather, 74 collectives a step."""
    decode = Part(tokens=64, lane_tokens=(64,), shared_lens=(), draws=64, is_prefill=False)
    whole = counts.operations(LLAMA, decode)
    assert sum(e.count for e in whole) == 74
    assert sum(e.count for e in whole if e.verb == "all_reduce") == 73
    assert {e.bytes for e in whole if e.verb == "all_reduce"} == {64 * 4096 * 2}
    assert [e for e in whole if e.verb == "all_gather"] == [Expected("tp", "all_gather", "logits", 1, 64 * 64 * 2)]
    sharded = counts.operations(dataclasses.replace(LLAMA, sequence_form=True), decode)
    assert sum(e.count for e in sharded if e.verb == "reduce_scatter") == 73
    assert sum(e.count for e in sharded if e.verb == "all_gather") == 74
    last = counts.operations(dataclasses.replace(LLAMA, tp=1, layers=18, is_first=False), decode)
    assert last == [Expected("pp", "recv", "activations", 1, 64 * 4096 * 2)]


# -- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RIGHT)
def test_real_runs_keep_all_rules(name, runs):
    """And every rule has something to look at, preempted sequences and chunks of prompts among it."""
    ranks, layout = runs[name], RIGHT[name][2]
    num_checked = {rule: check(ranks) for rule, check in RULES.items()}
    assert num_checked["token before next step"] >= len(PROMPT_LENS) * (MAX_TOKENS - 1)
    assert num_checked["written before read"] > 1000
    assert num_checked["same collectives"] > 20
    assert num_checked["no sp in decode"] >= LEAST_DECODE_STEPS
    assert (num_checked["sends meet receives"] > 0) == ("pp" in layout or "sp" in layout)
    if "sp" in layout:
        assert any(r.track == "sp" for rank in ranks for r in rank.transfers())
    if layout["two_batch"] != "off":
        assert any(len(step.parts) == 2 for step in ranks[0].steps.values())
    parts = [part for rank in lane_ranks(ranks).values() for part in rank.parts() if part.is_prefill]
    assert any((part.context_lens > 0).any() for part in parts), "a chunk that is not a prompt's first"
    firsts = [n for part in parts for n, start in zip(part.sequence_ids, part.context_lens, strict=True) if start == 0]
    if "sp" not in layout:  # lanes have their pages each, enough for what they own
        assert len(firsts) > len(PROMPT_LENS), "a sequence that was preempted"


@pytest.mark.parametrize("name", WRONG)
def test_wrong_schedules_break_their_rule(name, runs):
    broken = broken_rules(runs[name])
    assert set(broken) == WRONG[name][-1], broken


def test_wrong_schedules_break_the_formulas_too(runs, configs):
    with pytest.raises(AssertionError):
        for rank in runs["gather in decode"]:
            stage, found = stage_of(configs["mixtral"], rank, {}), operations_of(rank)
            for part in rank.parts():
                assert found[part.tick, part.part] == expected_of(stage, part)


def test_a_wrong_schedule_starts_before_the_token_is_there(runs):
    """Not only with a made-up token: the clock says so."""
    ranks = runs["made up tokens"]
    drawn = {tick: np.full_like(tokens, 7) for rank in ranks for tick, tokens in rank.drawn.items()}
    deceived = [dataclasses.replace(rank, drawn=drawn if rank.mesh.is_sampler else {}) for rank in ranks]
    with pytest.raises(RuleBroken, match="before it exists"):
        RULES["token before next step"](deceived)


DOCTORED = {
    "another dtype": lambda r: r._replace(dtype="int32"),
    "another shape": lambda r: r._replace(shape=r.shape[::-1]),
    "fewer bytes": lambda r: r._replace(bytes=r.bytes - 4),
    "another microbatch": lambda r: r._replace(tick=r.tick + 1),
    "nothing": lambda r: None,
}
"""What would hang, or is refused, in a real run."""


@pytest.mark.parametrize("change", DOCTORED)
@pytest.mark.parametrize("verb", ["send", "recv", "all_reduce"])
def test_doctored_records_break_the_rules(verb, change, runs):
    ranks = list(runs["llama tp2 x pp2"])
    rule = "same collectives" if verb == "all_reduce" else "sends meet receives"
    index = 3 if verb == "recv" else 0
    doctored = next(r for r in ranks[index].transfers() if r.verb == verb and len(r.shape) == 2 and r.tick > 3)
    changed = DOCTORED[change](doctored)
    records = [changed if r == doctored else r for r in ranks[index].records]
    ranks[index] = dataclasses.replace(ranks[index], records=[r for r in records if r is not None])
    with pytest.raises(RuleBroken):
        RULES[rule](ranks)
    assert set(broken_rules(ranks)) == {rule}


# -- two-batch overlap, measured at the start -------------------------------------------------------------------------


def test_ranks_agree_on_the_smallest_divided_step(runs):
    """Rank 0 would divide from 32 tokens on, rank 1 from 64: both do what all gain by."""
    ranks = runs[AUTO]
    assert {rank.two_batch_tokens for rank in ranks} == {max(GAINS)}
    for rank in ranks:
        for step in rank.steps.values():
            assert len(step.parts) == (2 if step.num_tokens >= max(GAINS) else 1)
        # Steps from 32 tokens on that only rank 0 would have divided are among them.
        assert {min(step.num_tokens, 32) // 32 + step.num_tokens // 64 for step in rank.steps.values()} == {0, 1, 2}
    assert not broken_rules(ranks)
