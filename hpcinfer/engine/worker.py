"""A worker: one rank's part of a replica. It executes what the scheduler decided."""

from __future__ import annotations

import time

import torch

from hpcinfer.batch import MicroBatch
from hpcinfer.comm.communicator import FinishedHandle, Handle
from hpcinfer.observe.metrics import PhaseClock
from hpcinfer.parallel.groups import ReplicaGroups
from hpcinfer.pipeline.runner import StageRunner
from hpcinfer.sampling.sampler import SamplingBatch, sample

SAMPLER, LEADER = 0, 1
"""Ranks in the communicator that returns drawn tokens (`ReplicaGroups.tokens`)."""


class Worker:
    """Executes microbatches on one rank.

    One rank of a replica samples (the last stage's first tp rank), one leads (the first stage's first tp rank). With one
    stage they are the same; with more, the drawn tokens travel over `groups.tokens`.

    Args:
        runner: this rank's stage.
        groups: this rank's communicators and its place in the mesh.
        device: where the stage computes.
        clock: where prefill, decode and communication times are added.
    """

    def __init__(
        self, runner: StageRunner, groups: ReplicaGroups, *, device: torch.device, clock: PhaseClock
    ) -> None:
        self._runner = runner
        self._groups = groups
        self._samples = groups.mesh.is_sampler
        self._leads = groups.mesh.is_leader
        self._device = device
        self._clock = clock
        self._returning: Handle | None = None

    @property
    def samples(self) -> bool:
        """True where `execute` needs a SamplingBatch."""
        return self._samples

    def execute(self, batch: MicroBatch, sampling: SamplingBatch | None) -> Handle | None:
        """Compute a microbatch on this rank's stage.

        Args:
            batch: what to compute.
            sampling: parameters of the sequences that draw a token; needed where `samples`.

        Returns:
            On the leader a handle of the drawn tokens, int64 [S]; None elsewhere.
        """
        start_s, waited_s = time.perf_counter(), self._groups.wait_s()
        logits = self._runner.run(batch)
        handle = self._return_tokens(logits, sampling, int(batch.samples.sum()))
        self._count(batch, time.perf_counter() - start_s, self._groups.wait_s() - waited_s)
        return handle

    def drain(self) -> None:
        """Return when everything this rank sent has left."""
        self._runner.drain()
        if self._returning is not None:
            self._returning.wait()

    def _return_tokens(
        self, logits: torch.Tensor | None, sampling: SamplingBatch | None, num_drawn: int
    ) -> Handle | None:
        if self._samples:
            drawn = sample(logits, sampling) if num_drawn else torch.empty(0, dtype=torch.int64, device=self._device)
            if self._leads:
                return FinishedHandle(drawn)
            if num_drawn:
                if self._returning is not None:
                    self._returning.wait()  # over by now: the leader had these tokens before it sent this tick's message
                self._returning = self._groups.tokens.send(drawn, LEADER, label="tokens")
        elif self._leads:
            drawn = torch.empty(num_drawn, dtype=torch.int64, device=self._device)
            return self._groups.tokens.recv(drawn, SAMPLER, label="tokens") if num_drawn else FinishedHandle(drawn)
        return None

    def _count(self, batch: MicroBatch, elapsed_s: float, waited_s: float) -> None:
        """A mixed microbatch's time is shared between the two phases by tokens."""
        prefill_share = batch.num_prefill_tokens / batch.num_tokens
        self._clock.add("prefill", (elapsed_s - waited_s) * prefill_share)
        self._clock.add("decode", (elapsed_s - waited_s) * (1 - prefill_share))
        self._clock.add("communication", waited_s)
