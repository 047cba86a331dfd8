"""The tick loop of a replica: the leader says what arrives, every rank schedules and executes the same steps."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable

import numpy as np

from hpcinfer.batch import Step
from hpcinfer.comm.host import Expected, HostChannel
from hpcinfer.comm.operation import Mark
from hpcinfer.data.stop_text import StopTexts
from hpcinfer.engine.findings import note
from hpcinfer.engine.worker import PlannedStep, StepResults, Worker
from hpcinfer.observe.trace import TICK, Recorder, span
from hpcinfer.request import Request
from hpcinfer.sampling.grammar import Grammars
from hpcinfer.sampling.history import History
from hpcinfer.sampling.masks import Matching, TokenMasks
from hpcinfer.sampling.processors import Draw
from hpcinfer.sampling.sampler import SamplingBatch
from hpcinfer.scheduler.message import TickMessage
from hpcinfer.scheduler.scheduler import Scheduler
from hpcinfer.scheduler.sequence import NO_TOKEN, EndedSequence, Sequence

LEADER = 0
_NO_DEADLINE = float("inf")


class Replica:
    """One rank of a replica. The leader calls `step()` and at the end `stop()`; the other ranks call `follow()`. Before requests with
    stop texts the leader sets `stop_texts`.

    Tick n on the leader: wait for the tokens of tick n - lag, broadcast the message of tick n, apply it, schedule, execute.
    The other ranks look ahead: while they compute a step, the message of the next one may arrive; they then schedule it
    and post its receives at once, so that its activations travel meanwhile.

    Args:
        worker, scheduler: of this rank.
        control: among all ranks of the replica.
        mark: names the tick in reports of the control channel.
        recorder: gets the time spent on messages and schedules.
        expert_load: see `StageModel.expert_load`.
        masks: of rows with constraints, on a rank that draws; without them the text of all rows is free.
        grammars: for the leader, which checks constraints.
    """

    def __init__(
        self,
        *,
        worker: Worker,
        scheduler: Scheduler,
        control: HostChannel,
        mark: Mark | None = None,
        recorder: Recorder | None = None,
        expert_load: Callable[[], dict[int, np.ndarray]] = dict,
        masks: TokenMasks | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.expert_load = expert_load
        self.stop_texts: StopTexts | None = None
        self.grammars = grammars
        self._masks = masks
        self._worker = worker
        self._control = control
        self._mark = mark or Mark()
        self._recorder = recorder
        self._next_tick = 0
        self._in_flight: dict[int, tuple[Step, dict[int, StepResults]]] = {}  # tick -> what its lanes find

    @property
    def is_leader(self) -> bool:
        return self._control.rank == LEADER

    @property
    def is_idle(self) -> bool:
        """True when there is no sequence left to generate."""
        return self.scheduler.num_sequences == 0

    def step(self, requests: list[Request], *, give_back: bool = False, drain: bool = False) -> list[EndedSequence]:
        """Leader: run one tick with new `requests`; return the sequences that ended.

        Args:
            give_back: those that have not begun end now.
            drain: all of them do.
        """
        ended, planned = self._take(self._message(tuple(requests), give_back=give_back, drain=drain))
        if planned is not None:
            with span(self._recorder, "execute", TICK, tick=planned.step.tick):
                self._in_flight[planned.step.tick] = (planned.step, self._worker.execute(planned))
        return ended

    def stop(self) -> None:
        """Leader: end the loop on every rank. What is still in work is given up.

        Raises:
            CommunicationError: another rank did not get there within the deadline.
        """
        while self._in_flight:  # tokens in flight must be received before communicators close
            self.step([], drain=True)
        self._take(self._message(stop=True))
        self._leave()

    def follow(self, *, silence_s: float = _NO_DEADLINE) -> None:
        """Other ranks: take part in every tick until the leader stops.

        Args:
            silence_s: how long the leader may send nothing before it counts as stuck. Its first message may take any
                time: before it, all that earlier lives of the run have written may have to be read.

        Raises:
            CommunicationError: the leader was silent for longer, or another transfer was over its deadline.
        """
        ahead = _LookAhead(self, silence_s)
        while (planned := ahead.next()) is not None:
            with span(self._recorder, "execute", TICK, tick=planned.step.tick):
                self._worker.execute(planned, between=ahead.look)
        self._leave()

    def close(self) -> None:
        """Let go of what holds operations of communicators, before they are closed."""
        self._worker.close()
        if self._masks is not None:
            self._masks.close()

    def _leave(self) -> None:
        """The end, on every rank. They part together: one that is stuck is missed here, by a wait with a deadline."""
        self._worker.drain()
        self._control.barrier()
        self._mark.set()

    def _message(
        self, requests: tuple[Request, ...] = (), *, give_back: bool = False, drain: bool = False, stop: bool = False
    ) -> TickMessage:
        start_s = time.perf_counter()
        self._mark.set(self._next_tick)
        ids, tokens = self._results(self._next_tick - self.scheduler.limits.lag)
        message = TickMessage(
            tick=self._next_tick,
            requests=requests,
            result_ids=ids,
            result_tokens=tokens,
            stopped_ids=self._stopped(ids, tokens),
            state_hash=self.scheduler.state_hash(),
            give_back=give_back,
            drain=drain,
            stop=stop,
        )
        self._control.broadcast(message, root=LEADER)
        if self._recorder is not None:
            self._recorder.add(TICK, "message", start_s, tick=message.tick)
        return message

    def _results(self, tick: int) -> tuple[np.ndarray, np.ndarray]:
        ids, tokens = [], []
        if tick in self._in_flight:
            step, found = self._in_flight.pop(tick)
            for lane, results in sorted(found.items()):
                if results.tokens is not None:
                    ids.append(np.array(step.drawing[lane], np.int64))
                    tokens.append(results.tokens.wait().numpy())
                note(self.scheduler, step, lane, results)
        return np.concatenate([np.empty(0, np.int64), *ids]), np.concatenate([np.empty(0, np.int64), *tokens])

    def _stopped(self, ids: np.ndarray, tokens: np.ndarray) -> tuple[int, ...]:
        """The sequences whose new token ends a stop text."""
        if self.stop_texts is None:
            return ()
        stopped = []
        for sequence_id, token in zip(ids.tolist(), tokens.tolist(), strict=True):
            sequence = self.scheduler.find(sequence_id)
            if sequence is not None and sequence.request.sampling.stop and token not in NO_TOKEN:
                if sequence.stop_watch is None:
                    output = sequence.tokens[sequence.num_prompt_tokens :]
                    sequence.stop_watch = self.stop_texts.watch(sequence.request.sampling, output)
                if sequence.stop_watch.add(token):
                    stopped.append(sequence_id)
        return tuple(stopped)

    def _take(self, message: TickMessage) -> tuple[list[EndedSequence], PlannedStep | None]:
        """Apply a message, schedule, and post what the step will receive."""
        start_s = time.perf_counter()
        self._next_tick = message.tick + 1
        ended = self.scheduler.apply(message)
        step = None if message.stop else self.scheduler.schedule()
        planned = None if step is None else self._worker.plan(step, self._sampling(step))
        if self._recorder is not None:
            self._recorder.add(TICK, "schedule", start_s, tick=message.tick)
        return ended, planned

    def _expect(self, tick: int, silence_s: float) -> Expected:
        """Take part in the broadcast of a tick's message. It has a deadline of its own: between ticks a leader may
        read, tokenise and commit."""
        self._mark.set(tick)
        return self._control.expect(root=LEADER, deadline_s=silence_s)

    def _sampling(self, step: Step) -> SamplingBatch | None:
        # Now, and not when the step is executed: the sequences may have moved on by then.
        drawn = self._worker.drawn_here(step)
        if not drawn:
            return None
        sequences = [self.scheduler.sequence(number) for number in drawn]
        # Whatever of the tokens before is known: the next one's position is the number of those that are computed.
        draws = [Draw(sequence.request, sequence.num_computed, _history(sequence)) for sequence in sequences]
        masks = self._masks.start((_matching(sequence), sequence.tokens) for sequence in sequences) if self._masks else None
        return SamplingBatch.of(draws, self.scheduler.limits.eos_token_ids, masks=masks)


def _history(sequence: Sequence) -> History | None:
    """What the sampler knows of a sequence up to now, where its logits are edited."""
    if not sequence.edits_logits:
        return None
    if sequence.history is None:
        sequence.history = History(sequence.request)
    sequence.history.advance(sequence.tokens)
    return sequence.history


def _matching(sequence: Sequence) -> Matching | None:
    """The sequence's place in its constraint, if it has one."""
    if sequence.matching is None and sequence.request.sampling.is_structured:
        sequence.matching = Matching(sequence.request)
    return sequence.matching


class _LookAhead:
    """The messages of a rank that follows, taken as early as they come, at most `lag` ahead of what is executed."""

    def __init__(self, replica: Replica, silence_s: float) -> None:
        self._replica = replica
        self._silence_s = silence_s
        self._planned: collections.deque[PlannedStep] = collections.deque()
        self._stopped = False
        self._expected = replica._expect(replica._next_tick, _NO_DEADLINE)

    def next(self) -> PlannedStep | None:
        """The next step to execute; None after the last."""
        while not self._planned and not self._stopped:
            self._take()
        return self._planned.popleft() if self._planned else None

    def look(self) -> None:
        """Take a message that has come. Never blocks."""
        if not self._stopped and len(self._planned) < self._replica.scheduler.limits.lag and self._expected.done():
            self._take()

    def _take(self) -> None:
        message = self._expected.wait()
        self._stopped = message.stop
        if not message.stop:
            self._expected = self._replica._expect(message.tick + 1, self._silence_s)
        _, planned = self._replica._take(message)
        if planned is not None:
            self._planned.append(planned)
