"""A worker: one rank's part of a replica. It executes what the scheduler decided."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import numpy as np
import torch

from hpcinfer.batch import Step
from hpcinfer.comm.communicator import Handle
from hpcinfer.engine.host_copy import HostCopies
from hpcinfer.engine.step_clock import StepClock
from hpcinfer.kernels.logprobs import token_logprobs
from hpcinfer.observe.trace import COMPUTE, Recorder
from hpcinfer.parallel.groups import ReplicaGroups
from hpcinfer.pipeline.runner import PreparedStep, StageRunner
from hpcinfer.pipeline.transfer import Outbox
from hpcinfer.sampling.logits import on_device
from hpcinfer.sampling.sampler import SamplingBatch, sample

SAMPLER, LEADER = 0, 1
"""Ranks in the communicators that return drawn tokens (`ReplicaGroups.tokens`)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepResults:
    """What the sampler of a lane finds in a step; on the leader handles of tensors in host memory, None where there is nothing."""

    tokens: Handle | torch.Tensor | None = None
    """int64 [S]: the drawn tokens."""
    logprobs: Handle | torch.Tensor | None = None
    """int32 [A, 1 + 2 step.num_asked_top]: the log-probabilities of A of them, see `kernels.logprobs.join_shards`."""
    scored: Handle | torch.Tensor | None = None
    """int32 [R, 1 + 2 step.num_scored_top]: those of the tokens of prompts."""
    pooled: Handle | torch.Tensor | None = None
    """float64 [Q, D]: sums of hidden states."""

    def each(self, act: Callable[[torch.Tensor, str], Handle]) -> StepResults:
        """`act` on all that there is, in the order in which it travels."""
        fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return StepResults(**{name: act(value, name) for name, value in fields if value is not None})


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStep:
    """A step that was decided, with its transfers posted."""

    prepared: PreparedStep
    sampling: SamplingBatch | None
    """What this rank draws with; None where it draws nothing."""
    returning: dict[int, StepResults]
    """On the leader: lane -> what another rank finds there, on its way to the host."""

    @property
    def step(self) -> Step:
        return self.prepared.step


class Worker:
    """Executes steps on one rank.

    One rank of each lane samples (the last stage's first tp rank), one of the replica leads (the first stage's first). Where
    they are not the same rank the drawn tokens, and what else a step finds, travel over `groups.tokens`.

    Running ahead (`SchedulerLimits.run_ahead`), the drawn tokens also stay on the devices of their lane, for the next step.

    Args:
        runner: this rank's stage.
        groups: this rank's communicators and its place in the mesh.
        device: where the stage computes.
        clock: measures steps.
        run_ahead: drawn tokens stay for the next step.
        recorder: gets the drawing of tokens.
    """

    def __init__(
        self,
        runner: StageRunner,
        groups: ReplicaGroups,
        *,
        device: torch.device,
        clock: StepClock,
        run_ahead: bool = False,
        recorder: Recorder | None = None,
    ) -> None:
        self._runner = runner
        self._groups = groups
        self._samples = groups.mesh.is_sampler
        self._leads = groups.mesh.is_leader
        self._lane = groups.mesh.lane
        self._device = device
        self._clock = clock
        self._recorder = recorder
        self._copies = HostCopies(device)
        self._run_ahead = run_ahead
        self._kept: Handle | None = None
        self._outbox = Outbox()

    def drawn_here(self, step: Step) -> tuple[int, ...]:
        """The sequences of a step for which this rank draws."""
        return step.drawing[self._lane] if self._samples else ()

    def plan(self, step: Step, sampling: SamplingBatch | None) -> PlannedStep:
        """Post the receives of a step. Steps are planned, and then executed, in the order of their ticks.

        Args:
            sampling: parameters of the sequences that are `drawn_here`; None where there are none.
        """
        returning = {}
        self._groups.mark.set(step.tick)
        if self._leads:
            for lane, link in self._groups.tokens.items():
                returning[lane] = self._room(step, lane).each(
                    lambda room, label, link=link: self._copies.of_transfer(link.recv(room, SAMPLER, label=label))
                )
        return PlannedStep(prepared=self._runner.prepare(step), sampling=sampling, returning=returning)

    def execute(self, planned: PlannedStep, *, between: Callable[[], None] | None = None) -> dict[int, StepResults]:
        """Compute a step on this rank's stage.

        Args:
            between: called between segments of computation.

        Returns:
            On the leader what was found, by lane; empty elsewhere.
        """
        step = planned.step
        with self._clock.measured(step):
            kept = None if self._kept is None else self._kept.wait()
            logits = self._runner.run(planned.prepared, drawn=kept, between=between)
            self._groups.mark.set(step.tick)
            found = self._find(logits, planned)
            if self._run_ahead:
                self._keep(found.tokens, len(step.drawing[self._lane]))
        results = dict(planned.returning)
        if self._samples and self._leads:
            results[self._lane] = found.each(self._copies.of_tensor)
        elif self._samples:
            found.each(self._send)
        return results

    def close(self) -> None:
        """Let go of what holds operations of communicators."""
        self._runner.close()

    def drain(self) -> None:
        """Return when everything this rank sent has left."""
        self._runner.drain()
        self._outbox.drain()

    def _room(self, step: Step, lane: int) -> StepResults:
        """Memory for what the sampler of a lane sends."""
        def rows(count: int, num_top: int) -> torch.Tensor | None:
            return torch.empty(count, 1 + 2 * num_top, dtype=torch.int32, device=self._device) if count else None

        count = len(step.drawing[lane])
        return StepResults(
            tokens=torch.empty(count, dtype=torch.int64, device=self._device) if count else None,
            logprobs=rows(len(step.asked[lane]), step.num_asked_top) if step.asked else None,
            scored=rows(sum(span.num_tokens for span in step.scored[lane]), step.num_scored_top) if step.scored else None,
            pooled=torch.empty(len(step.pooled[lane]), self._runner.hidden_size, dtype=torch.float64, device=self._device)
            if step.pooled and step.pooled[lane] else None,
        )

    def _send(self, tensor: torch.Tensor, label: str) -> Handle:
        handle = self._groups.tokens[self._lane].send(tensor, LEADER, label=label)
        self._outbox.add(handle)
        return handle

    def _find(self, logits: torch.Tensor | None, planned: PlannedStep) -> StepResults:
        """What this rank finds when its stage has been computed: on a sampler the tokens, and what is asked for beside them."""
        if not self._samples:
            return StepResults()
        step = planned.step
        tokens = None if planned.sampling is None else self._draw(logits, planned)
        logprobs = scored = pooled = None
        readouts = [readout for readout in planned.prepared.readouts if readout is not None]
        if step.asked and step.asked[self._lane]:
            (places,) = on_device((np.array(step.asked[self._lane]),), self._device)
            logprobs = token_logprobs(logits[places], tokens[places], step.num_asked_top)
        if step.scored and step.scored[self._lane]:
            scored = torch.cat([readout.logprobs for readout in readouts if readout.logprobs is not None])
        if step.pooled and step.pooled[self._lane]:
            pooled = torch.cat([readout.pooled for readout in readouts if readout.pooled is not None])
        return StepResults(tokens=tokens, logprobs=logprobs, scored=scored, pooled=pooled)

    def _draw(self, logits: torch.Tensor, planned: PlannedStep) -> torch.Tensor:
        """float32 logits [S, V] -> int64 [S]."""
        start_s = time.perf_counter()
        tokens = sample(logits, planned.sampling)
        if self._recorder is not None:
            self._recorder.add(COMPUTE, "sample", start_s, tick=planned.step.tick)
        return tokens

    def _keep(self, tokens: torch.Tensor | None, count: int) -> None:
        """The `count` tokens that this lane's sampler has drawn, on all its tp ranks, until the next step. Collective over tp."""
        if count == 0:
            self._kept = None
            return
        if tokens is None:
            tokens = torch.empty(count, dtype=torch.int64, device=self._device)
        self._kept = self._groups.axes.tp.broadcast(tokens, 0, label="drawn")
