"""A worker: one rank's part of a replica. It executes what the scheduler decided."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from hpcinfer.batch import Step
from hpcinfer.comm.communicator import FinishedHandle, Handle
from hpcinfer.observe.metrics import PhaseClock
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
    """On the leader: lane -> tokens that another rank draws, int64 [S]."""

    @property
    def step(self) -> Step:
        return self.prepared.step


class Worker:
    """Executes steps on one rank.

    One rank of each lane samples (the last stage's first tp rank), one of the replica leads (the first stage's first). Where
    they are not the same rank the drawn tokens travel over `groups.tokens`.

    Args:
        runner: this rank's stage.
        groups: this rank's communicators and its place in the mesh.
        device: where the stage computes.
        clock: where prefill, decode and communication times are added.
        recorder: gets the drawing of tokens.
    """

    def __init__(
        self,
        runner: StageRunner,
        groups: ReplicaGroups,
        *,
        device: torch.device,
        clock: PhaseClock,
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
                    returning[lane] = link.recv(tokens, SAMPLER, label="tokens")
        return PlannedStep(prepared=self._runner.prepare(step), sampling=sampling, returning=returning)

    def execute(self, planned: PlannedStep, *, between: Callable[[], None] | None = None) -> dict[int, Handle]:
        """Compute a step on this rank's stage.

        Args:
            between: called between segments of computation.

        Returns:
            On the leader handles of the drawn tokens, lane -> int64 [S]; empty elsewhere.
        """
        start_s, waited_s = time.perf_counter(), self._groups.wait_s()
        logits = self._runner.run(planned.prepared, between=between)
        computed_s = time.perf_counter()
        self._groups.mark.set(planned.step.tick)
        drawn = dict(planned.returning)
        if planned.sampling is not None:
            tokens = sample(logits, planned.sampling)
            if self._leads:
                drawn[self._lane] = FinishedHandle(tokens)
            else:
                self._outbox.add(self._groups.tokens[self._lane].send(tokens, LEADER, label="tokens"))
            if self._recorder is not None:
                self._recorder.add(COMPUTE, "sample", computed_s, tick=planned.step.tick)
        self._count(planned.step, time.perf_counter() - start_s, self._groups.wait_s() - waited_s)
        return drawn

    def drain(self) -> None:
        """Return when everything this rank sent has left."""
        self._runner.drain()
        self._outbox.drain()

    def _count(self, step: Step, elapsed_s: float, waited_s: float) -> None:
        """A mixed step's time is shared between the two phases by tokens."""
        prefill_share = sum(part.num_prefill_tokens for part in step.parts) / max(step.num_tokens, 1)
        self._clock.add("prefill", (elapsed_s - waited_s) * prefill_share)
        self._clock.add("decode", (elapsed_s - waited_s) * (1 - prefill_share))
        self._clock.add("communication", waited_s)
