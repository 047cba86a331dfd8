"""Schedules that are wrong on purpose, each against one rule of `order_rules`, and none so that it hangs."""

from __future__ import annotations

import collections
from collections.abc import Callable

import numpy as np
import pytest
import torch

from hpcinfer.engine import build as build_module
from hpcinfer.models.decoder import DecoderStage
from hpcinfer.parallel.mesh import Mesh
from hpcinfer.pipeline import runner as runner_module
from hpcinfer.pipeline.schedule import interleave
from hpcinfer.scheduler.scheduler import Scheduler

MADE_UP = 7
"""A token that nobody has drawn."""


def interleave_reversed(forwards, *, between=None, before_segment=None, on_segment=None):
    """Every turn of the second part before the first one's."""
    last = len(forwards) - 1
    results = interleave(
        forwards[::-1], between=between,
        before_segment=before_segment and (lambda index, *rest: before_segment(last - index, *rest)),
        on_segment=on_segment and (lambda index, *rest: on_segment(last - index, *rest)),
    )
    return results[::-1]


class ImpatientScheduler(Scheduler):
    """Does not wait for a token: it makes one up and goes on, and puts the drawn one in its place when it comes."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._made_up: dict[int, collections.deque[int]] = collections.defaultdict(collections.deque)

    def schedule(self):
        step = super().schedule()
        for lane in step.drawing if step else ():
            for number in lane:
                tokens = self.sequence(number).tokens
                self._made_up[number].append(len(tokens))
                tokens.append(MADE_UP)
        return step

    def _take_results(self, ids, tokens, stopped):
        ended = []
        for number, token in zip(ids.tolist(), tokens.tolist(), strict=True):
            if number not in self._by_id:  # it has ended, and one too many was drawn
                continue
            sequence = self.sequence(number)
            position = self._made_up[number].popleft()
            sequence.tokens[position] = token
            if position + 1 - sequence.num_prompt_tokens == sequence.request.sampling.max_tokens:
                del sequence.tokens[position + 1 :]
                ended += super()._take_results(np.array([number]), np.array([sequence.tokens.pop()]), stopped)
        return ended


def second_part_first(patch: pytest.MonkeyPatch, mesh: Mesh) -> None:
    """On all ranks alike."""
    patch.setattr(runner_module, "interleave", interleave_reversed)


def second_part_first_on_last_rank(patch: pytest.MonkeyPatch, mesh: Mesh) -> None:
    if mesh.rank == mesh.size - 1:
        patch.setattr(runner_module, "interleave", interleave_reversed)


def made_up_tokens(patch: pytest.MonkeyPatch, mesh: Mesh) -> None:
    patch.setattr(build_module, "Scheduler", ImpatientScheduler)


def gather_in_decode(patch: pytest.MonkeyPatch, mesh: Mesh) -> None:
    forward = DecoderStage.forward

    def gathering(self, inputs, kv):
        if not inputs.metadata.is_prefill:
            yield self.axes.sp.all_gather(torch.zeros(max(inputs.metadata.lane_tokens), 8), label="layer 0 kv")
        result = yield from forward(self, inputs, kv)
        return result

    patch.setattr(DecoderStage, "forward", gathering)


WRONG: dict[str, Callable[[pytest.MonkeyPatch, Mesh], None]] = {
    name.__name__.replace("_", " "): name
    for name in (second_part_first, second_part_first_on_last_rank, made_up_tokens, gather_in_decode)
}
"""Name -> what makes the schedules of this rank wrong until the patch is undone."""
