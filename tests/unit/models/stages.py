"""Run a model of several stages and tensor-parallel ranks in this process, on a schedule of chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from hpcinfer.attention.base import AttentionBackend
from hpcinfer.batch import MicroBatch
from hpcinfer.comm.bootstrap import local_world
from hpcinfer.comm.local import LocalCommunicator
from hpcinfer.config.model import ModelConfig
from hpcinfer.kvcache.pool import KvPool
from hpcinfer.models.base import StageInputs, StageModel
from hpcinfer.models.checkpoint import Checkpoint
from hpcinfer.models.registry import model_class
from hpcinfer.models.weights import load_stage
from hpcinfer.parallel.axes import StageAxes
from tests.checkpoints import load_reference, make_variant
from tests.unit.layers.lockstep import LockstepCommunicator, run_lockstep

CPU = torch.device("cpu")
BLOCK_SIZE = 4
# Tensors of these small models then span extents, share them, and lie at odd places in them.
EXTENT_BYTES = 4099


def build_stages(
    folder: Path, backend: type[AttentionBackend], *, tp: int = 1, stages: Sequence[range] | None = None,
    dtype: torch.dtype = torch.float32, sequence_form: bool = False, ep: int = 1, packed_experts: bool = False,
) -> list[list[StageModel]]:
    """All ranks of one replica: [stage][tp rank], weights loaded. `ep` is 1 or tp."""
    config = dataclasses.replace(ModelConfig.from_folder(folder), packed_experts=packed_experts)
    checkpoint = Checkpoint(folder)
    built = []
    for layers in stages or [range(config.num_layers)]:
        ranks = []
        for rank in range(tp):
            comm = LocalCommunicator("tp") if tp == 1 else LockstepCommunicator(rank, tp)
            axes = StageAxes(
                tp=comm, ep=comm if ep > 1 else LocalCommunicator("ep"), sequence_form=sequence_form
            )
            model = model_class(config)(
                config, layers=layers, axes=axes, backend=backend(), dtype=dtype, device=CPU
            )
            load_stage(model, checkpoint, local_world(), extent_bytes=EXTENT_BYTES)
            ranks.append(model)
        built.append(ranks)
    return built


class Replica:
    """Stages with their pages. Unused pages hold NaN, and every sequence's pages are in random order."""

    def __init__(self, stages: list[list[StageModel]], *, max_len: int, num_sequences: int, seed: int = 0) -> None:
        self.stages = stages
        per_sequence = -(-max_len // BLOCK_SIZE)
        num_blocks = 2 * num_sequences * per_sequence
        order = np.random.default_rng(seed).permutation(num_blocks)
        self.block_tables = order[: num_sequences * per_sequence].reshape(num_sequences, per_sequence)
        self.pools = [
            [_poisoned(model.allocate_kv(num_blocks=num_blocks, block_size=BLOCK_SIZE)) for model in ranks]
            for ranks in stages
        ]
        self.context = np.zeros(num_sequences, np.int32)
        self.log: list = []

    def step(self, chunks: dict[int, np.ndarray], samples: Sequence[bool] | None = None) -> torch.Tensor:
        """Compute {sequence: next tokens}; logits [number of samples, V] in the order of the dict."""
        ids = np.array(list(chunks), np.int64)
        microbatch = MicroBatch(
            tick=0,
            sequence_ids=tuple(chunks),
            token_ids=np.concatenate([np.empty(0, np.int32), *chunks.values()]).astype(np.int32),
            query_lens=np.array([len(tokens) for tokens in chunks.values()], np.int32),
            context_lens=self.context[ids],
            block_tables=self.block_tables[ids].astype(np.int32),
            samples=np.array([True] * len(ids) if samples is None else samples, bool),
        )
        hidden: list[torch.Tensor | None] = [None] * len(self.stages[0])
        with torch.inference_mode():
            for ranks, pools in zip(self.stages, self.pools):
                forwards = []
                for model, pool, received in zip(ranks, pools, hidden):
                    inputs = StageInputs.from_microbatch(microbatch, block_size=BLOCK_SIZE, device=CPU, hidden=received)
                    forwards.append(model.forward(inputs, pool))
                hidden = run_lockstep(forwards, self.log)
        for other in hidden[1:]:
            torch.testing.assert_close(other, hidden[0], rtol=0, atol=0)
        self.context[ids] += microbatch.query_lens
        return hidden[0]


def _poisoned(pool: KvPool) -> KvPool:
    for index in range(pool.num_layers):
        for pages in pool.layer(index):
            pages.fill_(float("nan"))
    return pool


def max_logit_error(
    replica: Replica, sequences: list[np.ndarray], wanted: list[torch.Tensor], plan: list[dict]
) -> float:
    """Run `plan`, a list of {sequence: chunk length}, and compare the logits after each chunk with the reference.

    Args:
        sequences: token ids of each sequence.
        wanted: the reference's logits [tokens, V] of each sequence.
    """
    worst = 0.0
    for sizes in plan:
        start = replica.context.copy()
        logits = replica.step({i: sequences[i][start[i] : start[i] + n] for i, n in sizes.items()})
        expected = torch.stack([wanted[i][start[i] + n - 1] for i, n in sizes.items()])
        assert logits.shape == expected.shape and logits.dtype == torch.float32
        error = (logits - expected).abs().max().item()
        worst = error if error != error else max(worst, error)
    assert [len(tokens) for tokens in sequences] == replica.context.tolist(), "the plan leaves tokens out"
    return worst


def whole(lens: Sequence[int]) -> list[dict]:
    """One microbatch with every prompt."""
    return [dict(enumerate(lens))]


def chunked(lens: Sequence[int], size: int) -> list[dict]:
    """Every step takes the next `size` tokens of each sequence that has any."""
    return _until_done(lens, lambda i, step: size)


def decoded(lens: Sequence[int], prefill: float = 0.5) -> list[dict]:
    """A prefill of a part of each sequence, then one token a step."""
    return _until_done(lens, lambda i, step: max(1, int(lens[i] * prefill)) if step == 0 else 1)


def mixed(lens: Sequence[int], seed: int = 0) -> list[dict]:
    """Prefill chunks and decodes side by side, sequences joining late and pausing, in any order in the batch."""
    rng = np.random.default_rng(seed)
    left, plan = list(lens), []
    while any(left):
        waiting = [i for i in rng.permutation(len(lens)) if left[i]]
        chosen = waiting[: rng.integers(1, len(waiting) + 1)]
        sizes = {int(i): int(min(left[i], rng.choice([1, 1, 2, 5, 9]))) for i in chosen}
        for i, n in sizes.items():
            left[i] -= n
        plan.append(sizes)
    return plan


def _until_done(lens: Sequence[int], size) -> list[dict]:
    left, plan = list(lens), []
    while any(left):
        sizes = {i: min(n, size(i, len(plan))) for i, n in enumerate(left) if n}
        for i, n in sizes.items():
            left[i] -= n
        plan.append(sizes)
    return plan


def references(make_folder: Callable[[], Path], lens: Sequence[int]) -> Callable[..., tuple]:
    """(variant, overrides) -> (folder, sequences of these lengths, logits of transformers after each of their tokens).

    Each is made once.
    """
    made = {}

    def get(variant: str, **overrides):
        key = (variant, *sorted(overrides.items()))
        if key not in made:
            folder = make_variant(make_folder(), variant, **overrides)
            rng = np.random.default_rng(7)
            model = load_reference(folder)
            sequences = [rng.integers(0, model.config.vocab_size, n) for n in lens]
            with torch.no_grad():
                wanted = [model(torch.from_numpy(tokens)[None]).logits[0] for tokens in sequences]
            made[key] = (folder, sequences, wanted)
        return made[key]

    return get
