"""The replicated scheduler: continuous batching with chunked prefill and recompute preemption.

Every rank of a replica runs its own copy and must come to the same decisions, so nothing here looks at a clock, at the
order of a set, or at whether something has arrived: the only input is the numbered `TickMessage`.
"""

from __future__ import annotations

import collections
import dataclasses
import zlib

import numpy as np

from hpcinfer.batch import MicroBatch, Step
from hpcinfer.errors import ConfigError, ReplicaDivergedError, RowError
from hpcinfer.kvcache.blocks import BlockManager
from hpcinfer.request import NOT_A_TOKEN, FinishReason, Request
from hpcinfer.scheduler.message import TickMessage
from hpcinfer.scheduler.sequence import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerLimits:
    """What the replica agreed on at its start."""

    num_blocks: int
    """Pages of the K/V cache on every rank, page 0 (never owned) included."""
    block_size: int
    """Tokens a page holds."""
    max_batch_tokens: int
    """Most tokens in one microbatch."""
    max_sequences: int
    """Most sequences in work at once."""
    max_context: int
    """Longest sequence in tokens, prompt and output together."""
    lag: int
    """Tick n uses the results up to tick n - lag; also the number of microbatches in flight."""
    eos_token_ids: frozenset[int]
    """The model's own end-of-sequence ids."""
    num_lanes: int = 1
    """Lanes of the replica (sp)."""
    sp_min_tokens: int = 0
    """Sequences with fewer tokens to prefill are prefilled by their owner lane alone; read with more than one lane."""
    two_batch_tokens: int = 0
    """A step with at least this many tokens in its fullest lane is divided into two parts; 0 is off."""

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values fit into the pages."""
        return (self.num_blocks - 1) * self.block_size


@dataclasses.dataclass(slots=True)
class SchedulerCounters:
    """What happened, for the summary and for tests that must see a feature at work."""

    ticks: int = 0
    microbatches: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    decode_microbatches: int = 0
    """Microbatches with at least one decode in them."""
    decode_context_tokens: int = 0
    """Tokens whose keys and values decodes have read, summed over all decodes."""
    chunked_prefills: int = 0
    """Microbatch entries that computed only a part of a sequence's known tokens."""
    preemptions: int = 0
    max_in_flight: int = 0
    """Most microbatches in flight at once."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EndedSequence:
    """A sequence that left the scheduler; `reason` NONE without an error means that a drain cut it short."""

    request: Request
    output_token_ids: np.ndarray
    """int32: everything generated, earlier lives included."""
    reason: FinishReason
    error: str = ""
    """Why it failed."""

    @property
    def is_cut_short(self) -> bool:
        """True where a drain ended it."""
        return self.reason is FinishReason.NONE and not self.error

    @property
    def num_new_tokens(self) -> int:
        """Tokens generated since its request arrived; those of an earlier life are not counted."""
        return len(self.output_token_ids) - len(self.request.output_token_ids)


class Scheduler:
    """Decides which tokens every tick computes. Use: `apply(message)`, then `schedule()`, once a tick each."""

    def __init__(self, limits: SchedulerLimits, lane: int = 0) -> None:
        self.limits = limits
        self.blocks = BlockManager(limits.num_blocks, limits.block_size, release_lag=limits.lag)
        self.counters = SchedulerCounters()
        self._waiting: collections.deque[Sequence] = collections.deque()
        self._running: list[Sequence] = []  # in order of admission; the last is preempted first
        self._by_id: dict[int, Sequence] = {}
        self._next_id = 0
        self._tick = -1
        self._digest = 0
        self._in_flight: collections.deque[int] = collections.deque()  # ticks whose microbatch is not over

    # -- what it holds --------------------------------------------------------------------------------------------------

    @property
    def num_sequences(self) -> int:
        """Sequences waiting or running."""
        return len(self._by_id)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def sequence(self, sequence_id: int) -> Sequence:
        return self._by_id[sequence_id]

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
        if num_tokens >= limits.max_context:
            raise RowError(f"the prompt has {num_tokens} tokens; at most {limits.max_context - 1} leave room for an output token")
        longest = min(num_tokens + request.sampling.max_tokens, limits.max_context)
        if self.blocks.blocks_for(longest) > self.blocks.capacity:
            raise ConfigError(
                f"row {request.row} may reach {longest} tokens, prompt and output together: more than the K/V cache holds",
                found=f"pages for {limits.num_tokens} tokens",
                fix="raise engine.kv_memory, parallel.tp or parallel.pp, or lower engine.max_context; rows that are done stay",
            )

    # -- one tick ---------------------------------------------------------------------------------------------------------

    def state_hash(self) -> int:
        """A hash of everything decided so far; equal on all ranks of a replica before each message."""
        state = (self._tick, self._next_id, len(self._waiting), len(self._running), self.blocks.num_free, self._digest)
        return zlib.crc32(repr(state).encode())

    def apply(self, message: TickMessage) -> list[EndedSequence]:
        """Take in what the message says and return the sequences that ended by it.

        Raises:
            ReplicaDivergedError: this rank's state is not the leader's.
        """
        if message.tick != self._tick + 1 or message.state_hash != self.state_hash():
            raise ReplicaDivergedError(
                f"this rank's scheduler is not in the leader's state before tick {message.tick}",
                found=f"tick {self._tick}, state {self.state_hash():08x}; the leader's state is {message.state_hash:08x}",
                fix="this is a defect of hpcinfer: report it with the logs of all ranks",
            )
        self._tick = message.tick
        self.counters.ticks += 1
        self.blocks.advance(self._tick)
        while self._in_flight and self._in_flight[0] <= self._tick - self.limits.lag:
            self._in_flight.popleft()
        ended = self._take_results(message.result_ids, message.result_tokens)
        for request in message.requests:
            self._enqueue(request)
        if message.drain:
            ended += self._give_up_all()
        return ended

    def schedule(self) -> Step | None:
        """Choose this tick's tokens; None when nothing can be computed."""
        chosen: list[tuple[Sequence, int]] = []
        budget = self.limits.max_batch_tokens
        room = self._sequences_per_microbatch()
        promised = 0  # pages that starved sequences wait for
        for sequence in list(self._running):
            if budget == 0 or len(chosen) == room:
                break
            if sequence.num_to_compute == 0 or not sequence.blocks:  # awaits its token; preempted in this very loop
                continue
            num_tokens = min(sequence.num_to_compute, budget)
            missing = self.blocks.blocks_for(sequence.num_computed + num_tokens) - len(sequence.blocks)
            if missing > 0:
                if missing > self.blocks.num_free - promised:
                    self._make_room(sequence, missing + promised)
                    promised += missing
                    continue
                sequence.blocks += self.blocks.allocate(missing)
            self._choose(sequence, num_tokens, chosen)
            budget -= num_tokens
        if not promised:
            self._admit(chosen, budget, room)
        if not chosen:
            return None
        batch = self._microbatch(chosen)
        drawn = tuple(i for i, draws in zip(batch.sequence_ids, batch.samples, strict=True) if draws)
        return Step(tick=self._tick, parts=(batch,), drawing=(drawn,))

    # -- inside -----------------------------------------------------------------------------------------------------------

    def _enqueue(self, request: Request) -> None:
        sequence = Sequence(self._next_id, request)
        self._next_id += 1
        self._by_id[sequence.id] = sequence
        self._waiting.append(sequence)

    def _take_results(self, ids: np.ndarray, tokens: np.ndarray) -> list[EndedSequence]:
        ended = []
        for sequence_id, token in zip(ids.tolist(), tokens.tolist(), strict=True):
            sequence = self._by_id.get(sequence_id)
            if sequence is None:  # drained while its last token was in flight
                continue
            if token == NOT_A_TOKEN:
                self._running.remove(sequence)
                error = f"the model's logits are not finite numbers after {sequence.num_output_tokens} output tokens"
                ended.append(self._end(sequence, FinishReason.NONE, error))
                continue
            sequence.tokens.append(token)
            reason = sequence.finish_reason(self.limits.eos_token_ids, self.limits.max_context)
            if reason is not FinishReason.NONE:
                self._running.remove(sequence)
                ended.append(self._end(sequence, reason))
        return ended

    def _end(self, sequence: Sequence, reason: FinishReason, error: str = "") -> EndedSequence:
        del self._by_id[sequence.id]
        self.blocks.release(sequence.blocks, self._tick)
        return EndedSequence(
            request=sequence.request, output_token_ids=sequence.output_token_ids, reason=reason, error=error
        )

    def _give_up_all(self) -> list[EndedSequence]:
        ended = [self._end(sequence, FinishReason.NONE) for sequence in [*self._running, *self._waiting]]
        self._running.clear()
        self._waiting.clear()
        return ended

    def _sequences_per_microbatch(self) -> int:
        """With several microbatches in flight, an equal share of the sequences in each keeps every stage busy."""
        active = min(len(self._running) + len(self._waiting), self.limits.max_sequences)
        return -(-active // self.limits.lag)

    def _make_room(self, sequence: Sequence, wanted: int) -> None:
        """Preempt from the back until `wanted` pages are free or resting. Work in flight is never preempted."""
        for victim in reversed(list(self._running)):
            if victim is sequence or self.blocks.num_free + self.blocks.num_resting >= wanted:
                return
            if victim.last_tick <= self._tick - self.limits.lag:
                self._preempt(victim)

    def _preempt(self, victim: Sequence) -> None:
        self._running.remove(victim)
        self.blocks.release(victim.blocks, self._tick)
        victim.blocks = []
        victim.num_computed = 0
        victim.num_preemptions += 1
        self._waiting.appendleft(victim)
        self.counters.preemptions += 1

    def _admit(self, chosen: list[tuple[Sequence, int]], budget: int, room: int) -> None:
        while self._waiting and budget and len(chosen) < room and len(self._running) < self.limits.max_sequences:
            sequence = self._waiting[0]
            # Pages for all known tokens at once: a sequence half prefilled must not starve for the other half.
            needed = self.blocks.blocks_for(len(sequence.tokens))
            if needed > self.blocks.num_free:
                return
            self._waiting.popleft()
            self._running.append(sequence)
            sequence.blocks = self.blocks.allocate(needed)
            num_tokens = min(sequence.num_to_compute, budget)
            self._choose(sequence, num_tokens, chosen)
            budget -= num_tokens

    def _choose(self, sequence: Sequence, num_tokens: int, chosen: list[tuple[Sequence, int]]) -> None:
        sequence.last_tick = self._tick
        chosen.append((sequence, num_tokens))

    def _microbatch(self, chosen: list[tuple[Sequence, int]]) -> MicroBatch:
        widest = max(len(sequence.blocks) for sequence, _ in chosen)
        block_tables = np.zeros((len(chosen), widest), np.int32)
        token_ids: list[int] = []
        context_lens = np.empty(len(chosen), np.int32)
        samples = np.empty(len(chosen), bool)
        for index, (sequence, num_tokens) in enumerate(chosen):
            start = sequence.num_computed
            block_tables[index, : len(sequence.blocks)] = sequence.blocks
            token_ids += sequence.tokens[start : start + num_tokens]
            context_lens[index] = start
            sequence.num_computed += num_tokens
            samples[index] = sequence.num_to_compute == 0
        batch = MicroBatch(
            tick=self._tick,
            sequence_ids=tuple(sequence.id for sequence, _ in chosen),
            token_ids=np.array(token_ids, np.int32),
            query_lens=np.array([num_tokens for _, num_tokens in chosen], np.int32),
            context_lens=context_lens,
            block_tables=block_tables,
            samples=samples,
        )
        self._count(batch)
        return batch

    def _count(self, batch: MicroBatch) -> None:
        self._in_flight.append(batch.tick)
        counters = self.counters
        counters.microbatches += 1
        counters.max_in_flight = max(counters.max_in_flight, len(self._in_flight))
        counters.prefill_tokens += batch.num_prefill_tokens
        decodes = batch.is_decode
        counters.decode_tokens += int(decodes.sum())
        counters.decode_microbatches += bool(decodes.any())
        counters.decode_context_tokens += int(batch.context_lens[decodes].sum())
        counters.chunked_prefills += int((~batch.samples).sum())
        for array in (batch.token_ids, batch.query_lens, batch.block_tables):
            self._digest = zlib.crc32(array.tobytes(), self._digest)
        self._digest = zlib.crc32(repr(batch.sequence_ids).encode(), self._digest)
