"""The tick loop of a replica: the leader says what arrives, every rank schedules and executes the same microbatch."""

from __future__ import annotations

import numpy as np

from hpcinfer.batch import MicroBatch
from hpcinfer.comm.communicator import Handle
from hpcinfer.comm.host import HostChannel
from hpcinfer.engine.worker import Worker
from hpcinfer.request import Request
from hpcinfer.sampling.sampler import SamplingBatch
from hpcinfer.scheduler.message import TickMessage
from hpcinfer.scheduler.scheduler import EndedSequence, Scheduler

LEADER = 0
_NOTHING = np.empty(0, np.int64)


class Replica:
    """One rank of a replica. The leader calls `step()` and at the end `stop()`; the other ranks call `follow()`.

    Tick n on the leader: wait for the tokens of tick n - lag, broadcast the message of tick n, apply it, schedule, execute.
    Between them up to `lag` microbatches are in flight, one in each stage.
    """

    def __init__(self, *, worker: Worker, scheduler: Scheduler, control: HostChannel) -> None:
        self.scheduler = scheduler
        self._worker = worker
        self._control = control
        self._next_tick = 0
        self._drawing: dict[int, tuple[np.ndarray, Handle]] = {}  # tick -> (sequence ids, their tokens)

    @property
    def is_leader(self) -> bool:
        return self._control.rank == LEADER

    @property
    def is_idle(self) -> bool:
        """True when there is no sequence left to generate."""
        return self.scheduler.num_sequences == 0

    def step(self, requests: list[Request], *, drain: bool = False) -> list[EndedSequence]:
        """Leader: run one tick with new `requests`; return the sequences that ended."""
        return self._tick(self._message(tuple(requests), drain=drain))

    def stop(self) -> None:
        """Leader: end the loop on every rank. What is still in work is given up."""
        while self._drawing:  # tokens in flight must be received before communicators close
            self._tick(self._message(drain=True))
        self._tick(self._message(stop=True))

    def follow(self) -> None:
        """Other ranks: take part in every tick until the leader stops."""
        while True:
            # A leader may read, tokenise and commit between ticks: no deadline but the one of the launcher.
            message = self._control.broadcast(root=LEADER, deadline_s=float("inf"))
            self._tick(message)
            if message.stop:
                return

    def _message(self, requests: tuple[Request, ...] = (), *, drain: bool = False, stop: bool = False) -> TickMessage:
        ids, tokens = self._results(self._next_tick - self.scheduler.limits.lag)
        message = TickMessage(
            tick=self._next_tick,
            requests=requests,
            result_ids=ids,
            result_tokens=tokens,
            state_hash=self.scheduler.state_hash(),
            drain=drain,
            stop=stop,
        )
        self._control.broadcast(message, root=LEADER)
        return message

    def _results(self, tick: int) -> tuple[np.ndarray, np.ndarray]:
        if tick not in self._drawing:
            return _NOTHING, _NOTHING
        ids, handle = self._drawing.pop(tick)
        return ids, handle.wait().cpu().numpy()

    def _tick(self, message: TickMessage) -> list[EndedSequence]:
        self._next_tick = message.tick + 1
        ended = self.scheduler.apply(message)
        if message.stop:
            self._worker.drain()
            return ended
        batch = self.scheduler.schedule()
        if batch is not None:
            handle = self._worker.execute(batch, self._sampling(batch) if self._worker.samples else None)
            if handle is not None:
                self._drawing[batch.tick] = (np.array(batch.sequence_ids, np.int64)[batch.samples], handle)
        return ended

    def _sampling(self, batch: MicroBatch) -> SamplingBatch:
        drawing = [self.scheduler.sequence(i) for i, draws in zip(batch.sequence_ids, batch.samples, strict=True) if draws]
        return SamplingBatch.of((sequence.request, len(sequence.tokens)) for sequence in drawing)
