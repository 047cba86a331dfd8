"""A worker: one rank's part of a replica. It executes what the scheduler decided."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from hpcinfer.batch import Step
from hpcinfer.comm.communicator import Handle
from hpcinfer.engine.host_copy import HostCopies
from hpcinfer.engine.step_clock import StepClock
from hpcinfer.observe.trace import COMPUTE, Recorder
from hpcinfer.parallel.groups import ReplicaGroups
from hpcinfer.pipeline.runner import PreparedStep, StageRunner
from hpcinfer.pipeline.transfer import Outbox
from hpcinfer.sampling.sampler import SamplingBatch, sample

SAMPLER, LEADER = 0, 1
"""Ranks in the communicators that return drawn tokens (`ReplicaGroups.tokens`)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStep:
    """A step that was decided, with its transfers posted."""

    prepared: PreparedStep
    sampling: SamplingBatch | None
    """What this rank draws with; None where it draws nothing."""
    returning: dict[int, Handle]
    """On the leader: lane -> tokens that another rank draws, int64 [S], on their way to the host."""

    @property
    def step(self) -> Step:
        return self.prepared.step


class Worker:
    """Executes steps on one rank.

    One rank of each lane samples (the last stage's first tp rank), one of the replica leads (the first stage's first). Where
    they are not the same rank the drawn tokens travel over `groups.tokens`.

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
                if step.drawing[lane]:
                    tokens = torch.empty(len(step.drawing[lane]), dtype=torch.int64, device=self._device)
                    returning[lane] = self._copies.of_transfer(link.recv(tokens, SAMPLER, label="tokens"))
        return PlannedStep(prepared=self._runner.prepare(step), sampling=sampling, returning=returning)

    def execute(self, planned: PlannedStep, *, between: Callable[[], None] | None = None) -> dict[int, Handle]:
        """Compute a step on this rank's stage.

        Args:
            between: called between segments of computation.

        Returns:
            On the leader handles of the drawn tokens, lane -> int64 [S] in host memory; empty elsewhere.
        """
        step = planned.step
        with self._clock.measured(step):
            kept = None if self._kept is None else self._kept.wait()
            logits = self._runner.run(planned.prepared, drawn=kept, between=between)
            self._groups.mark.set(step.tick)
            tokens = None if planned.sampling is None else self._draw(logits, planned)
            if self._run_ahead:
                self._keep(tokens, len(step.drawing[self._lane]))
        drawn = dict(planned.returning)
        if tokens is not None and self._leads:
            drawn[self._lane] = self._copies.of_tensor(tokens, "tokens")
        elif tokens is not None:
            self._outbox.add(self._groups.tokens[self._lane].send(tokens, LEADER, label="tokens"))
        return drawn

    def close(self) -> None:
        """Let go of what holds operations of communicators."""
        self._runner.close()

    def drain(self) -> None:
        """Return when everything this rank sent has left."""
        self._runner.drain()
        self._outbox.drain()

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
