"""The mixture layer: wherever its experts lie, all ranks together compute what one rank does alone.

Every place is a grid of lanes and tp ranks whose forwards are stepped together; lanes may have no tokens.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from hpcinfer.attention.metadata import AttentionMetadata, build_metadata
from hpcinfer.batch import MicroBatch
from hpcinfer.comm.local import LocalCommunicator
from hpcinfer.config.model import ModelConfig
from hpcinfer.layers.moe import MoeMlp, share_rows
from hpcinfer.layers.router import Router
from hpcinfer.parallel.axes import StageAxes
from hpcinfer.parallel.tensor import pad_rows, token_stream
from tests.unit.layers.lockstep import LockstepCommunicator, run_lockstep

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    family="MixtralForCausalLM", vocab_size=11, hidden_size=16, intermediate_size=13, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=8, num_experts=7, experts_per_token=3, expert_size=13, router="softmax_topk",
    normalize_topk=True,
)
CLAMPED = dataclasses.replace(
    CONFIG, router="topk_softmax", router_bias=True, expert_bias=True, swiglu_limit=0.7, num_experts=3,
    experts_per_token=2,
)
CONFIGS = {"silu": CONFIG, "clamped with biases": CLAMPED}
# lanes, tp, ep
PLACES = [
    (1, 1, 1), (1, 3, 1), (1, 4, 4), (1, 2, 2), (2, 2, 2), (2, 2, 1), (2, 1, 2), (3, 1, 3), (2, 2, 4), (2, 3, 6),
    (4, 1, 4),
]
# With the forms that differ there: prefill or not where tokens travel, sequence form or not with several tp ranks.
CASES = [
    (*place, is_prefill, sequence_form)
    for place in PLACES
    for is_prefill in ((True, False) if place[2] > place[1] else (True,))
    for sequence_form in ((False, True) if place[1] > 1 else (False,))
]
TOKENS = {"uneven": (5, 9, 1, 4), "a lane without": (0, 6, 0, 3), "fewer than tp": (1, 2, 1, 1), "none": (0, 0, 0, 0)}


class Grid:
    """The layer on every rank of `lanes` x `tp`, by lane * tp + tp rank, with the same random weights."""

    def __init__(self, config: ModelConfig, lanes: int, tp: int, ep: int, *, sequence_form: bool = False) -> None:
        self.tp, self.is_sharded = tp, sequence_form and tp > 1
        self.streams, self.layers = [], []
        everyone = tuple(range(lanes * tp))
        for lane in range(lanes):
            members = everyone[lane * tp : (lane + 1) * tp]
            for rank in range(tp):
                comm = LockstepCommunicator(rank, tp, "tp", members) if tp > 1 else LocalCommunicator("tp")
                spread = {1: LocalCommunicator("ep"), tp: comm}.get(ep)
                if spread is None:
                    spread = LockstepCommunicator(lane * tp + rank, lanes * tp, "ep", everyone)
                axes = StageAxes(tp=comm, ep=spread, sequence_form=sequence_form)
                stream = token_stream(axes)
                layer = MoeMlp(config, 1, axes=axes, stream=stream, dtype=torch.float32, device=CPU)
                load_random(layer, config)
                self.streams.append(stream)
                self.layers.append(layer)

    def run(
        self, x: list[torch.Tensor], *, is_prefill: bool = True, log: list | None = None,
        valid: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """x [T, D] of every lane, and which of its tokens are no padding -> [T, D] of every lane."""
        lane_tokens = tuple(len(part) for part in x)
        forwards = []
        for index, (stream, layer) in enumerate(zip(self.streams, self.layers)):
            lane = index // self.tp
            own = x[lane]
            if self.is_sharded:
                rows = stream.num_rows(len(own))
                own = pad_rows(own, rows * self.tp)[stream.tp.rank * rows : (stream.tp.rank + 1) * rows]
            metadata = metadata_of(lane_tokens, lane, is_prefill)
            metadata.valid = None if valid is None else valid[lane]
            forwards.append(layer.forward(own.clone(), metadata))
        with torch.inference_mode():
            results = run_lockstep(forwards, log)
        joined = []
        for lane, count in enumerate(lane_tokens):
            parts = results[lane * self.tp : (lane + 1) * self.tp]
            if self.is_sharded:
                parts = [torch.cat(parts)[:count]]
            assert all(torch.equal(other, parts[0]) for other in parts)
            joined.append(parts[0])
        return joined

    def load(self) -> torch.Tensor:
        return torch.stack([layer.load for layer in self.layers]).sum(0)


def load_random(layer: MoeMlp, config: ModelConfig, seed: int = 0) -> None:
    """The same whole tensors on every rank, of which each keeps its part."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / 2

    num, hidden, size = config.num_experts, config.hidden_size, config.expert_size
    layer.router.load_weight(draw(num, hidden))
    if config.router_bias:
        layer.router.load_bias(draw(num))
    for expert in range(num):
        gate, up, down = draw(size, hidden), draw(size, hidden), draw(hidden, size)
        biases = draw(size), draw(size), draw(hidden)
        if expert not in layer.experts.held:
            continue
        layer.experts.load_gate(gate, expert)
        layer.experts.load_up(up, expert)
        layer.experts.load_down(down, expert)
        if config.expert_bias:
            layer.experts.load_biases(*biases[:2], expert)
            layer.experts.load_down_bias(biases[2], expert)


def metadata_of(lane_tokens: tuple[int, ...], lane: int, is_prefill: bool) -> AttentionMetadata:
    count = lane_tokens[lane]
    microbatch = MicroBatch(
        tick=0, is_prefill=is_prefill, sequence_ids=(0,), token_ids=np.zeros(count, np.int32),
        query_lens=np.array([count], np.int32), context_lens=np.zeros(1, np.int32),
        block_tables=np.zeros((1, 8), np.int32), samples=np.ones(1, bool), lane_tokens=lane_tokens,
    )
    return build_metadata(microbatch, 4, CPU, lane=lane)


def inputs(counts: tuple[int, ...], config: ModelConfig, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, config.hidden_size, generator=generator) for count in counts]


def by_the_formula(config: ModelConfig, x: torch.Tensor) -> torch.Tensor:
    """One token and one expert at a time, in float64."""
    layer = Grid(config, 1, 1, 1).layers[0]
    router, experts, size = layer.router, layer.experts, config.expert_size
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, row in enumerate(x.double()):
        logits = router.weight.double() @ row + (router.bias.double() if config.router_bias else 0)
        if config.router == "softmax_topk":
            weights, ids = logits.softmax(0).topk(config.experts_per_token)
            weights = weights / weights.sum() if config.normalize_topk else weights
        else:
            weights, ids = logits.topk(config.experts_per_token)
            weights = weights.softmax(0)
        for weight, expert in zip(weights, ids):
            inner = experts.gate_up[expert].double() @ row
            if config.expert_bias:
                inner = inner + experts.gate_up_bias[expert].double()
            gate, up = inner[:size], inner[size:]
            if config.swiglu_limit:
                gate, up = gate.clamp(max=config.swiglu_limit), up.clamp(-config.swiglu_limit, config.swiglu_limit)
                inner = (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
            else:
                inner = gate / (1 + torch.exp(-gate)) * up
            y = experts.down[expert].double() @ inner
            if config.expert_bias:
                y = y + experts.down_bias[expert].double()
            out[token] += weight * y
    return out


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_rank_against_the_formula(name, normalize):
    config = dataclasses.replace(CONFIGS[name], normalize_topk=normalize)
    x = inputs((12,), config)
    got = Grid(config, 1, 1, 1).run(x)[0]
    torch.testing.assert_close(got.double(), by_the_formula(config, x[0]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("lanes", "tp", "ep", "is_prefill", "sequence_form"), CASES)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_place(name, lanes, tp, ep, is_prefill, sequence_form, tokens):
    config = CONFIGS[name]
    x = inputs(TOKENS[tokens][:lanes], config)
    grid, alone = Grid(config, lanes, tp, ep, sequence_form=sequence_form), Grid(config, 1, 1, 1)
    for got, part in zip(grid.run(x, is_prefill=is_prefill), x):
        torch.testing.assert_close(got, alone.run([part])[0], rtol=0, atol=1e-5)
    assert torch.equal(grid.load(), alone.load())
    assert grid.load().sum() == sum(map(len, x)) * config.experts_per_token


@pytest.mark.parametrize("sequence_form", [False, True])
@pytest.mark.parametrize(("lanes", "tp", "ep"), PLACES)
def test_padding_goes_to_nobody(lanes, tp, ep, sequence_form):
    """A decode with padding behind its tokens, as a captured step has it, gives the tokens the same and counts them alone."""
    counts, padded = (5, 2, 0, 3)[:lanes], 7
    x = [torch.cat((part, torch.full((padded - len(part), CONFIG.hidden_size), torch.nan))) for part in inputs(counts, CONFIG)]
    valid = [torch.arange(padded) < count for count in counts]
    grid, alone = Grid(CONFIG, lanes, tp, ep, sequence_form=sequence_form), Grid(CONFIG, 1, 1, 1)
    for got, part, count in zip(grid.run(x, is_prefill=False, valid=valid), x, counts):
        torch.testing.assert_close(got[:count], alone.run([part[:count]])[0], rtol=0, atol=1e-5)
        assert not got[count:].any()
    assert torch.equal(grid.load(), alone.load())


@pytest.mark.parametrize(("lanes", "tp", "ep"), [(1, 4, 4), (2, 2, 4), (2, 1, 2)])
@pytest.mark.parametrize("is_prefill", [True, False])
def test_all_tokens_to_one_expert(lanes, tp, ep, is_prefill):
    config = dataclasses.replace(CLAMPED, experts_per_token=1, num_experts=5)
    x = inputs((7, 4)[:lanes], config)
    grid, alone = Grid(config, lanes, tp, ep), Grid(config, 1, 1, 1)
    for layer in (*grid.layers, *alone.layers):
        layer.router.bias.copy_(torch.tensor([0, 0, 0, 1000.0, 0]))
    for got, part in zip(grid.run(x, is_prefill=is_prefill), x):
        torch.testing.assert_close(got, alone.run([part])[0], rtol=0, atol=1e-5)
    assert grid.load().tolist() == [0, 0, 0, sum(map(len, x)), 0]


@pytest.mark.parametrize(
    ("is_prefill", "verbs"), [(False, ["all_gather", "reduce_scatter"]), (True, ["all_to_all"] * 3)]
)
def test_the_transfers_do_not_depend_on_who_has_tokens(is_prefill, verbs):
    for counts in TOKENS.values():
        log: list = []
        Grid(CONFIG, 2, 2, 4).run(inputs(counts[:2], CONFIG), is_prefill=is_prefill, log=log)
        # The shares of each lane are gathered over its tp ranks at the end.
        assert [kind[0] for kind in log] == [*verbs, "all_gather", "all_gather"]


def test_shares():
    assert share_rows((5, 0, 1), 2) == (3, 2, 0, 0, 1, 0)
    assert share_rows((4,), 3) == (2, 2, 0)


def test_weights_are_rounded_where_the_family_does():
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    routers = [Router(CONFIG, rounded=rounded, dtype=torch.bfloat16, device=CPU) for rounded in (True, False)]
    for router in routers:
        router.load_weight(torch.randn(7, 16, generator=torch.Generator().manual_seed(1)))
    (ids, rounded), (same, exact) = (router.forward(x) for router in routers)
    assert torch.equal(ids, same) and rounded.dtype == exact.dtype == torch.float32
    assert torch.equal(rounded, exact.bfloat16().float()) and not torch.equal(rounded, exact)
    torch.testing.assert_close(exact.sum(1), torch.ones(9), rtol=0, atol=1e-6)
