"""The replicated scheduler: continuous batching with chunked prefill and recompute preemption.

Every rank of a replica runs its own copy and must come to the same decisions, so nothing here looks at a clock, at the
order of a set, or at whether something has arrived: the only input is the numbered `TickMessage`. With several lanes
(sequence parallelism) every rank decides for all of them and makes the microbatches of its own.
"""

from __future__ import annotations

import array
import collections
import zlib
from typing import NamedTuple

import numpy as np

from hpcinfer.batch import Step
from hpcinfer.errors import ConfigError, ReplicaDivergedError, RowError
from hpcinfer.request import FinishReason, Request
from hpcinfer.scheduler.balance import is_shared, share, step_tokens
from hpcinfer.scheduler.lanes import LanePages
from hpcinfer.scheduler.limits import SchedulerCounters, SchedulerLimits
from hpcinfer.scheduler.message import TickMessage
from hpcinfer.scheduler.microbatch import build_step
from hpcinfer.scheduler.sequence import NO_TOKEN, EndedSequence, Sequence
from hpcinfer.scheduler.work import Piece, Work, divide, goes_on


class _InFlight(NamedTuple):
    """A step that is not over."""

    tick: int
    num_tokens: int
    """In its fullest lane."""
    num_drawn: int


class Scheduler:
    """Decides which tokens every tick computes. Use: `apply(message)`, then `schedule()`, once a tick each.

    Args:
        limits: agreed over the replica.
        lane: whose microbatches `schedule()` makes; decisions do not depend on it.
        first_tick: number of the first message.
    """

    def __init__(self, limits: SchedulerLimits, lane: int = 0, *, first_tick: int = 0) -> None:
        self.limits = limits
        self.lane = lane
        self.pages = LanePages(limits)
        self.counters = SchedulerCounters()
        self._waiting: collections.deque[Sequence] = collections.deque()
        self._running: dict[int, Sequence] = {}  # in order of admission; the last is preempted first
        self._prefilling: dict[int, Sequence] = {}  # those of them whose prefill is not complete
        self._by_id: dict[int, Sequence] = {}
        self._next_id = 0
        self._tick = first_tick - 1
        self._digest = 0
        self._in_flight: collections.deque[_InFlight] = collections.deque()

    # -- what it holds -------------------------------------------------------------------------------------------------

    @property
    def num_sequences(self) -> int:
        """Sequences waiting or running."""
        return len(self._by_id)

    @property
    def next_tick(self) -> int:
        """Number of the message that `apply` takes next."""
        return self._tick + 1

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def sequence(self, sequence_id: int) -> Sequence:
        return self._by_id[sequence_id]

    def find(self, sequence_id: int) -> Sequence | None:
        """A sequence that waits or runs; None where it has ended."""
        return self._by_id.get(sequence_id)

    def refuse(self, request: Request) -> None:
        """Raise where `request` could never run within the limits, whatever else runs.

        Raises:
            RowError: it has no tokens, or is too long for the model: it would fail in every start.
            ConfigError: it is too long for this start's K/V cache: another layout or setting can run it.
        """
        limits = self.limits
        num_tokens = len(request.prompt_token_ids)
        if num_tokens == 0:
            raise RowError("the prompt has no tokens")
        if num_tokens > limits.max_context - request.task.generates:
            most = f"{limits.max_context - 1} leave room for an output token" if request.task.generates else f"{limits.max_context} fit"
            raise RowError(f"the prompt has {num_tokens} tokens; at most {most}")
        longest = min(num_tokens + request.sampling.max_tokens, limits.max_context)
        if self.pages.blocks_for(longest) > self.pages.capacity:
            raise ConfigError(
                f"row {request.row} may reach {longest} tokens, prompt and output together: "
                "more than the K/V cache holds",
                found=f"pages for {limits.num_tokens} tokens",
                fix="raise engine.kv_memory, parallel.tp or parallel.pp, or lower engine.max_context; "
                "rows that are done stay",
            )

    # -- one tick ------------------------------------------------------------------------------------------------------

    def state_hash(self) -> int:
        """A hash of everything decided so far; before each message equal on all ranks of a replica, in all lanes."""
        state = (self._tick, self._next_id, len(self._waiting), len(self._running), self.pages.state, self._digest)
        return zlib.crc32(repr(state).encode())

    def apply(self, message: TickMessage) -> list[EndedSequence]:
        """Take in what the message says and return the sequences that ended by it.

        Raises:
            ReplicaDivergedError: this rank's state is not the leader's.
        """
        if message.tick != self._tick + 1 or message.state_hash != self.state_hash():
            raise ReplicaDivergedError(
                f"this rank's scheduler is not in the leader's state before tick {message.tick}",
                found=f"tick {self._tick}, state {self.state_hash():08x}; "
                f"the leader's state is {message.state_hash:08x}",
                fix="this is a defect of hpcinfer: report it with the logs of all ranks",
            )
        self._tick = message.tick
        self.counters.ticks += 1
        self.pages.advance(self._tick)
        while self._in_flight and self._in_flight[0].tick <= self._tick - self.limits.num_in_flight:
            self._in_flight.popleft()
        ended = self._take_results(message.result_ids, message.result_tokens, message.stopped_ids)
        for request in message.requests:
            self._enqueue(request)
        if message.give_back or message.drain:
            ended += self._give_up(begun_too=message.drain)
        return ended

    def schedule(self) -> Step | None:
        """Choose this tick's tokens on all lanes and return this lane's parts; None when nothing can be computed."""
        work = self._choose()
        if not work.pieces:
            return None
        parts = self._parts(work)
        step = build_step(parts, self.lane, tick=self._tick, block_size=self.limits.block_size)
        self._count(work, parts, step)
        for lane, drawn in enumerate(step.drawing):
            for place, sequence_id in enumerate(drawn):
                sequence = self._by_id[sequence_id]
                sequence.num_awaited += 1
                sequence.drawn_at = (lane, place)
        for piece in work.shared:
            if piece.draws:  # the owner decodes it; nobody else reads it after this step
                self.pages.give_back(piece.sequence, self._tick, but=piece.sequence.owner)
        return step

    # -- messages ------------------------------------------------------------------------------------------------------

    def _enqueue(self, request: Request) -> None:
        sequence = Sequence(self._next_id, request, num_lanes=self.limits.num_lanes)
        self._next_id += 1
        self._by_id[sequence.id] = sequence
        self._waiting.append(sequence)
        self._digest = zlib.crc32(np.array(sequence.tokens, np.int32).tobytes(), self._digest)

    def _take_results(self, ids: np.ndarray, tokens: np.ndarray, stopped: tuple[int, ...]) -> list[EndedSequence]:
        self._digest = zlib.crc32(ids.tobytes() + tokens.tobytes() + repr(stopped).encode(), self._digest)
        ended = []
        for sequence_id, token in zip(ids.tolist(), tokens.tolist(), strict=True):
            sequence = self._by_id.get(sequence_id)
            if sequence is None:  # it ended, or was drained, while its last token was in flight
                self.counters.dropped_tokens += 1
                continue
            sequence.num_awaited -= 1
            if token in NO_TOKEN:
                error = NO_TOKEN[token] and f"{NO_TOKEN[token]} after {sequence.num_output_tokens} output tokens"
                ended.append(self._end(sequence, FinishReason.NONE if error else FinishReason.STOP, error))
                continue
            sequence.tokens.append(token)
            reason = sequence.finish_reason(self.limits.eos_token_ids, self.limits.max_context)
            reason = FinishReason.STOP if sequence_id in stopped else reason
            if reason is not FinishReason.NONE:
                ended.append(self._end(sequence, reason))
        return ended

    def _end(self, sequence: Sequence, reason: FinishReason, error: str = "") -> EndedSequence:
        del self._by_id[sequence.id]
        self._stop(sequence)
        return EndedSequence(
            request=sequence.request, output_token_ids=sequence.output_token_ids, reason=reason, error=error,
            findings=sequence.findings,
        )

    def _give_up(self, *, begun_too: bool) -> list[EndedSequence]:
        """End the sequences that have not begun, or all. One that waits after a preemption has begun."""
        given_up = list(self._running.values()) if begun_too else []
        kept: collections.deque[Sequence] = collections.deque()
        for sequence in self._waiting:
            (kept if sequence.num_preemptions and not begun_too else given_up).append(sequence)
        self._waiting = kept
        return [self._end(sequence, FinishReason.NONE) for sequence in given_up]

    # -- choosing ------------------------------------------------------------------------------------------------------

    def _choose(self) -> Work:
        """What all lanes compute in this tick. Decodes may stand beside prefill where there is one lane only."""
        limits = self.limits
        work = Work.nothing(limits.num_lanes)
        tokens = step_tokens(
            limits, self.pages,
            in_flight=sum(step.num_tokens for step in self._in_flight),
            num_ready=self._num_ready() if limits.num_lanes == 1 else 0,
            prefilling=self._prefilling.values(),
            waiting=self._waiting,
            room=0 if any(self.pages.promised) else limits.max_sequences - len(self._running),
        )
        budgets = [tokens] * limits.num_lanes
        if limits.num_lanes == 1:
            self._choose_decodes(work, budgets)
            num_decodes = len(work.local[0])
            self._choose_prefills(work, budgets)
            self._admit(work, budgets, num_decodes=num_decodes)
            return work
        self._choose_prefills(work, budgets)
        self._admit(work, budgets)
        if not work.pieces:
            self._choose_decodes(work, [limits.max_batch_tokens] * limits.num_lanes)
        if not work.pieces:  # lanes that closed their doors for a starved decode may find it gone
            self._admit(work, budgets)
        return work

    def _choose_decodes(self, work: Work, budgets: list[int]) -> None:
        """One token of every sequence that was given its last; in each lane an equal share for each step in flight."""
        tick, block_size, pages = self._tick, self.limits.block_size, self.pages
        rooms = [min(b, share(n, self.limits)) for b, n in zip(budgets, pages.num_running, strict=True)]
        left = sum(rooms)
        context_tokens = 0
        pages.promised = [0] * self.limits.num_lanes
        for sequence in list(self._running.values()):
            if left == 0:
                break
            start, lane = sequence.num_computed, sequence.owner
            # Its token is awaited; it is being prefilled, or was preempted in this very loop; its lane is full.
            if not self._has_next_token(sequence) or start < sequence.prefill_end or rooms[lane] == 0:
                continue
            if start == len(sequence.tables[lane]) * block_size and not self._take_page(sequence, lane):
                continue
            sequence.num_computed = start + 1
            sequence.last_tick = tick
            work.local[lane].append(Piece(sequence, start, 1, True))
            self.counters.tokens_ahead += start >= len(sequence.tokens)
            context_tokens += start
            rooms[lane] -= 1
            left -= 1
        for lane, pieces in enumerate(work.local):
            budgets[lane] -= len(pieces)
            self.counters.decode_tokens += len(pieces)
        self.counters.decode_context_tokens += context_tokens

    def _has_next_token(self, sequence: Sequence) -> bool:
        """Whether the token after those that are computed is there: known, or, running ahead, on the device of its lane."""
        if sequence.num_computed < len(sequence.tokens):
            return True
        return (
            self.limits.run_ahead and not sequence.needs_history and sequence.num_awaited == 1
            and sequence.drawn_at[0] == sequence.owner and not sequence.ends_with_awaited(self.limits.max_context)
        )

    def _choose_prefills(self, work: Work, budgets: list[int]) -> None:
        for sequence in list(self._prefilling.values()):
            self._choose_chunk(sequence, work, budgets)

    def _choose_chunk(self, sequence: Sequence, work: Work, budgets: list[int]) -> None:
        """As many of its tokens as the budgets allow. Its pages for all of them are its own since it was admitted."""
        num_lanes = self.limits.num_lanes
        most = num_lanes * min(budgets) if sequence.is_shared else budgets[sequence.owner]
        num_tokens = min(sequence.num_to_compute, most)
        if num_tokens == 0:
            return
        piece = Piece(sequence, sequence.num_computed, num_tokens, num_tokens == sequence.num_to_compute)
        sequence.num_computed += num_tokens
        sequence.last_tick = self._tick
        if sequence.is_shared:
            work.shared.append(piece)
            for lane in range(num_lanes):
                budgets[lane] -= -(-num_tokens // num_lanes)
        else:
            work.local[sequence.owner].append(piece)
            budgets[sequence.owner] -= num_tokens
        if piece.draws:
            del self._prefilling[sequence.id]

    def _num_ready(self) -> int:
        """Decodes that await no token."""
        return max(0, len(self._running) - len(self._prefilling) - sum(step.num_drawn for step in self._in_flight))

    def _admit(self, work: Work, budgets: list[int], *, num_decodes: int = 0) -> None:
        """Start waiting sequences: with this step's decodes not more than its share of all that could be in work."""
        most = self.limits.max_sequences
        active = min(len(self._running) + len(self._waiting), most)
        for _ in range(min(share(active, self.limits) - num_decodes, most - len(self._running))):
            if not self._waiting or not self._place(self._waiting[0], budgets):
                return
            sequence = self._waiting.popleft()
            self.counters.begun += not sequence.num_preemptions
            self._running[sequence.id] = self._prefilling[sequence.id] = sequence
            self._choose_chunk(sequence, work, budgets)

    # -- pages ---------------------------------------------------------------------------------------------------------

    def _place(self, sequence: Sequence, budgets: list[int]) -> bool:
        """Choose the owner and take pages, where there is room for a first chunk and for all known tokens at once: a
        sequence half prefilled must not starve for the other half."""
        pages, num_tokens = self.pages, len(sequence.tokens)
        needed, owner = pages.blocks_for(num_tokens), pages.next_owner()
        shared = is_shared(num_tokens, self.limits)
        lanes = range(self.limits.num_lanes) if shared else (owner,)
        if not all(budgets[lane] > 0 and pages.can_admit(lane, needed) for lane in lanes):
            return False
        sequence.owner, sequence.is_shared, sequence.prefill_end = owner, shared, num_tokens
        pages.num_running[owner] += 1
        for lane in lanes:
            pages.take(sequence, lane, needed)
        self.counters.shared_prefills += shared
        self.counters.local_prefills_under_sp += self.limits.num_lanes > 1 and not shared
        return True

    def _take_page(self, sequence: Sequence, lane: int) -> bool:
        """A page for its next token; or promise it one, preempt others for it, and return False."""
        if self.pages.promised[lane] < self.pages.lanes[lane].num_free:
            self.pages.take(sequence, lane, 1)
            return True
        self.pages.promised[lane] += 1
        self._make_room(sequence, lane)
        return False

    def _make_room(self, sequence: Sequence, lane: int) -> None:
        """Preempt from the back until the pages promised in `lane` are free or resting, but nothing in flight."""
        blocks, wanted = self.pages.lanes[lane], self.pages.promised[lane]
        for victim in reversed(list(self._running.values())):
            if victim is sequence or blocks.num_free + blocks.num_resting >= wanted:
                return
            if victim.tables[lane] and victim.last_tick <= self._tick - self.limits.lag:
                self._preempt(victim)

    def _preempt(self, victim: Sequence) -> None:
        self._stop(victim)
        victim.num_computed = 0
        victim.num_preemptions += 1
        self._waiting.appendleft(victim)
        self.counters.preemptions += 1

    def _stop(self, sequence: Sequence) -> None:
        """Take it out of the running ones, if it is one, and its pages back."""
        if self._running.pop(sequence.id, None) is None:
            return
        self._prefilling.pop(sequence.id, None)
        self.pages.num_running[sequence.owner] -= 1
        self.pages.give_back(sequence, self._tick)

    # -- the step ------------------------------------------------------------------------------------------------------

    def _parts(self, work: Work) -> tuple[Work, ...]:
        least = self.limits.two_batch_tokens
        if not (work.is_prefill or self.limits.divide_decodes):
            return (work,)
        if least > 0 and max(map(work.tokens_of, range(self.limits.num_lanes))) >= max(2, least):
            return divide(work)
        return (work,)

    def _count(self, work: Work, parts: tuple[Work, ...], step: Step) -> None:
        tokens = [sum(lane) for lane in zip(*[part.lane_tokens for part in step.parts], strict=True)]
        self._in_flight.append(_InFlight(self._tick, max(tokens), sum(map(len, step.drawing))))
        counters = self.counters
        counters.max_in_flight = max(counters.max_in_flight, len(self._in_flight))
        counters.microbatches += len(parts)
        counters.decode_microbatches += sum(part.has_decodes for part in parts)
        if work.is_prefill:
            chunks = [piece for piece in work.pieces if piece.is_prefill]
            counters.prefill_tokens += sum(piece.num_tokens for piece in chunks)
            counters.chunked_prefills += sum(not piece.draws for piece in chunks)
            counters.shared_tokens += sum(piece.num_tokens for piece in work.shared)
        if len(parts) > 1:
            counters.divided_steps += 1
            counters.divided_prompts += goes_on(*parts)
        for part, batch in zip(parts, step.parts, strict=True):
            counters.empty_lane_steps += batch.lane_tokens.count(0)
            sequences, starts, lengths, _ = zip(*part.pieces, strict=True)
            numbers = array.array("q", [sequence.id for sequence in sequences])
            numbers.extend(starts)
            numbers.extend(lengths)
            self._digest = zlib.crc32(numbers.tobytes(), self._digest)
