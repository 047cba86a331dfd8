"""A simulated replica for the scheduler: pages hold tokens instead of keys and values, so that reads can be checked."""

from __future__ import annotations

import collections
import zlib

import numpy as np

from hpcinfer.batch import MicroBatch, Step
from hpcinfer.request import Request, SamplingParams
from hpcinfer.scheduler.limits import SchedulerLimits
from hpcinfer.scheduler.message import TickMessage
from hpcinfer.scheduler.scheduler import EndedSequence, Scheduler

EOS = 7
NOBODY = -1


def limits(**changes) -> SchedulerLimits:
    defaults = dict(
        num_blocks=40, block_size=4, max_batch_tokens=64, max_sequences=16, max_context=100, lag=1,
        eos_token_ids=frozenset({EOS}),
    )
    return SchedulerLimits(**(defaults | changes))


def request(row: int, num_tokens: int, *, output: list[int] = (), sample: int = 0, **sampling) -> Request:
    prompt = np.random.default_rng(row).integers(10, 100, num_tokens).astype(np.int32)
    return Request(
        row=row, sample=sample, prompt_token_ids=prompt, sampling=SamplingParams(**({"max_tokens": 8} | sampling)),
        output_token_ids=np.array(output, np.int32),
    )


def next_token(prefix: list[int]) -> int:
    """The simulated model: any function of the whole prefix; sometimes the end of sequence."""
    digest = zlib.crc32(np.array(prefix, np.int32).tobytes())
    return EOS if digest % 11 == 0 else 10 + digest % 90


def ends_text(wanted: Request, token: int) -> bool:
    """The simulated tokenizer: which tokens complete a stop text."""
    return bool(wanted.sampling.stop) and token % 17 == 0


def reference(wanted: Request, max_context: int = 100) -> list[int]:
    tokens = wanted.prompt_token_ids.tolist()
    output: list[int] = []
    while True:
        output.append(next_token(tokens + output))
        ended = (output[-1] == EOS and not wanted.sampling.ignore_eos) or ends_text(wanted, output[-1])
        if ended or len(output) == wanted.sampling.max_tokens or len(tokens + output) >= max_context:
            return output


class SimulatedReplica:
    """One scheduler for each lane, and one more that follows lane 0, fed the same messages; executes their steps at
    once and returns the tokens `lag` ticks later. Pages are per lane; on the way every rule of a step is checked."""

    def __init__(self, scheduler_limits: SchedulerLimits) -> None:
        self.limits = scheduler_limits
        lanes = scheduler_limits.num_lanes
        self.schedulers = [Scheduler(scheduler_limits, lane) for lane in range(lanes)]
        self.scheduler = self.schedulers[0]
        self.follower = Scheduler(scheduler_limits)
        self.pages = np.full((lanes, scheduler_limits.num_blocks * scheduler_limits.block_size), -1, np.int64)
        self.used_by = np.full((lanes, scheduler_limits.num_blocks), NOBODY, np.int64)
        self.used_at = np.full((lanes, scheduler_limits.num_blocks), -1000, np.int64)
        self.drawn_at: dict[int, int] = {}
        self.device: list[list[int]] = [[] for _ in range(lanes)]
        """Of every lane the tokens that its devices drew in the last step."""
        self.results: dict[int, tuple[list[int], list[int]]] = {}
        self.tick = 0
        self.steps: list[list[Step]] = []
        """Of every tick that computed something the steps of all lanes."""

    @property
    def batches(self) -> list[MicroBatch]:
        """All microbatches of lane 0."""
        return [part for steps in self.steps for part in steps[0].parts]

    def step(self, requests: list[Request] = (), *, give_back: bool = False, drain: bool = False) -> list[EndedSequence]:
        ids, tokens = self.results.pop(self.tick - self.limits.lag, ([], []))
        known = {id: self.scheduler.find(id) for id in ids}
        stopped = [id for id, token in zip(ids, tokens, strict=True) if known[id] and ends_text(known[id].request, token)]
        message = TickMessage(
            tick=self.tick, requests=tuple(requests), result_ids=np.array(ids, np.int64), stopped_ids=tuple(stopped),
            result_tokens=np.array(tokens, np.int64), state_hash=self.scheduler.state_hash(), give_back=give_back, drain=drain,
        )
        ended = [scheduler.apply(message) for scheduler in [*self.schedulers, self.follower]]
        steps = [scheduler.schedule() for scheduler in self.schedulers]
        check_equal(steps[0], self.follower.schedule())
        assert len({scheduler.state_hash() for scheduler in [*self.schedulers, self.follower]}) == 1
        assert len({step is None for step in steps}) == 1
        if steps[0] is not None:
            self.steps.append(steps)
            self.results[self.tick] = self.execute(steps)
        self.tick += 1
        return ended[0]

    def execute(self, steps: list[Step]) -> tuple[list[int], list[int]]:
        """Part by part: write what all lanes compute, then let every entry read its whole prefix."""
        check_agreement(steps, self.limits)
        drawn: list[list[tuple[int, int]]] = [[] for _ in steps]
        for parts in zip(*(step.parts for step in steps), strict=True):
            self.check_order(parts)
            for lane, batch in enumerate(parts):
                self.write(lane, batch, parts)
            for lane, batch in enumerate(parts):
                drawn[lane] += self.read(lane, batch)
        for lane, step in enumerate(steps):
            assert step.drawing[lane] == tuple(sequence_id for sequence_id, _ in drawn[lane])
        self.device = [[token for _, token in results] for results in drawn]
        everything = [result for lane_results in drawn for result in lane_results]
        for sequence_id, _ in everything:
            assert self.drawn_at.get(sequence_id) != self.tick, "drawn twice"
            self.drawn_at[sequence_id] = self.tick
        return [sequence_id for sequence_id, _ in everything], [token for _, token in everything]

    def check_order(self, parts: tuple[MicroBatch, ...]) -> None:
        """Nothing is computed of a sequence whose last token is not delivered; shared tokens are prefill."""
        for lane, batch in enumerate(parts):
            assert batch.is_prefill or not any(batch.shared_lens)
            for number, (sequence_id, context) in enumerate(zip(batch.sequence_ids, batch.context_lens, strict=True)):
                assert self.tick - self.drawn_at.get(sequence_id, -1000) >= self.limits.num_in_flight
                sequence = self.scheduler.sequence(sequence_id)
                is_decode = context >= sequence.prefill_end
                if is_decode:
                    assert batch.query_lens[number] == 1 and batch.samples[number] and sequence.owner == lane
                if len(parts) > 1:
                    assert is_decode == (not batch.is_prefill)

    def write(self, lane: int, batch: MicroBatch, parts: tuple[MicroBatch, ...]) -> None:
        size = self.limits.block_size
        own_shared = batch.shared_lens[lane] if batch.shared_lens else 0
        positions, entries = token_positions(batch)
        slots = batch.block_tables[entries, positions // size] * size + positions % size
        assert slots.size == 0 or slots.min() >= size, "page 0 is never owned"
        self.pages[lane, slots[own_shared:]] = self.token_ids(lane, batch)[own_shared:]
        gathered = [part.token_ids[:count] for part, count in zip(parts, batch.shared_lens, strict=False)]
        if gathered:
            everyone = np.concatenate(gathered)
            assert len(everyone) == len(batch.shared_slots) == len(set(batch.shared_slots.tolist()))
            assert batch.shared_slots.min() >= size, "page 0 is never owned"
            self.pages[lane, batch.shared_slots] = everyone
            ids = [
                np.repeat(part.sequence_ids, part.query_lens)[:count]
                for part, count in zip(parts, batch.shared_lens, strict=True)
            ]
            self.use(lane, batch.shared_slots // size, np.concatenate(ids).astype(np.int64))
            start = sum(batch.shared_lens[:lane])
            np.testing.assert_array_equal(batch.shared_slots[start : start + own_shared], slots[:own_shared])
            entries = sum(np.cumsum(batch.query_lens) <= own_shared)
            assert batch.query_lens[:entries].sum() == own_shared, "an entry is shared as a whole or not at all"
        else:
            assert batch.shared_slots.size == 0

    def token_ids(self, lane: int, batch: MicroBatch) -> np.ndarray:
        """Its token ids; those that the host does not know, from what the lane drew in the step before."""
        assert self.limits.run_ahead or (batch.token_ids >= 0).all()
        return np.array([token if token >= 0 else self.device[lane][-1 - token] for token in batch.token_ids.tolist()], np.int64)

    def use(self, lane: int, blocks: np.ndarray, sequence_id: int | np.ndarray) -> None:
        """Note who reads or writes which pages: nobody may while work of another sequence on them is in flight."""
        others = (self.used_by[lane, blocks] != sequence_id) & (self.used_by[lane, blocks] != NOBODY)
        assert not (others & (self.tick - self.used_at[lane, blocks] < self.limits.lag)).any(), "a page in flight"
        self.used_by[lane, blocks], self.used_at[lane, blocks] = sequence_id, self.tick

    def read(self, lane: int, batch: MicroBatch) -> list[tuple[int, int]]:
        """Check what every entry sees in its own lane's pages and draw the tokens."""
        size, drawn = self.limits.block_size, []
        for index, sequence_id in enumerate(batch.sequence_ids):
            sequence = self.scheduler.sequence(sequence_id)
            length = int(batch.context_lens[index] + batch.query_lens[index])
            assert batch.query_lens[index] > 0
            table = batch.block_tables[index, : -(-length // size)]
            self.use(lane, table, sequence_id)
            positions = np.arange(length)
            prefix = self.pages[lane, table[positions // size] * size + positions % size].tolist()
            known = sequence.tokens[:length]
            assert prefix[: len(known)] == known, "a page was overwritten or never written"
            assert length - len(known) <= (self.limits.run_ahead and not sequence.needs_history)
            for position in range(len(known), length):
                assert prefix[position] == next_token(prefix[:position]), "another sequence's token"
            assert not batch.samples[index] or length == sequence.num_computed >= len(sequence.tokens)
            if batch.samples[index]:
                drawn.append((sequence_id, next_token(prefix)))
        return drawn


def token_positions(batch: MicroBatch) -> tuple[np.ndarray, np.ndarray]:
    """Of every token of a microbatch the position and the entry."""
    entries = np.repeat(np.arange(batch.num_entries), batch.query_lens)
    starts = np.cumsum(batch.query_lens) - batch.query_lens
    return np.arange(batch.num_tokens) - starts[entries] + batch.context_lens[entries], entries


def check_equal(step: Step | None, other: Step | None) -> None:
    assert (step is None) == (other is None)
    if step is not None:
        assert step.drawing == other.drawing and len(step.parts) == len(other.parts)
        for batch, twin in zip(step.parts, other.parts, strict=True):
            assert batch.sequence_ids == twin.sequence_ids
            np.testing.assert_array_equal(batch.block_tables, twin.block_tables)
            np.testing.assert_array_equal(batch.token_ids, twin.token_ids)


def check_agreement(steps: list[Step], scheduler_limits: SchedulerLimits) -> None:
    """What all lanes must say alike, and the sizes of what they compute."""
    assert len({step.drawing for step in steps}) == 1 and len(steps[0].drawing) == len(steps)
    assert len({len(step.parts) for step in steps}) == 1
    for number, parts in enumerate(zip(*(step.parts for step in steps), strict=True)):
        tokens = tuple(batch.num_tokens for batch in parts)
        assert any(tokens), "a part without tokens"
        assert len({batch.is_prefill for batch in parts}) == len({batch.shared_lens for batch in parts}) == 1
        for batch in parts:
            assert batch.part == number and batch.tick == steps[0].tick and batch.lane_tokens == tokens
            assert batch.shared_lens == () or (any(batch.shared_lens) and len(batch.shared_lens) == len(steps))
            assert batch.block_tables.shape[0] == batch.num_entries == len(batch.context_lens) == len(batch.samples)
            dtypes = (batch.token_ids.dtype, batch.query_lens.dtype, batch.context_lens.dtype, batch.block_tables.dtype)
            assert set(dtypes) == {np.dtype(np.int32)} and batch.samples.dtype == bool
            assert batch.shared_slots.dtype == np.int64
    most = max(step.num_tokens for step in steps)
    assert most <= scheduler_limits.max_batch_tokens
    if scheduler_limits.two_batch_tokens:
        # A shared piece in two parts may lie more evenly than it would whole, which is what was compared.
        least = max(2, scheduler_limits.two_batch_tokens)
        assert most >= least - (len(steps) > 1) if len(steps[0].parts) == 2 else most < least
    else:
        assert len(steps[0].parts) == 1


def check_empty(replica: SimulatedReplica) -> None:
    """At the end no page is lost."""
    pages, lanes = replica.scheduler.pages, replica.limits.num_lanes
    assert pages.num_free + pages.num_resting == lanes * (replica.limits.num_blocks - 1)
    for lane in pages.lanes:
        lane.advance(10**9)
        assert sorted(lane.allocate(lane.num_free)) == list(range(1, replica.limits.num_blocks))
    assert pages.num_running == pages.num_owned == [0] * lanes


def run(replica: SimulatedReplica, requests: list[Request], at_once: int = 1000) -> dict[int, EndedSequence]:
    """Feed requests, run until all have ended; row -> how."""
    waiting, ended = collections.deque(requests), {}
    for _ in range(20_000):
        new = [waiting.popleft() for _ in range(min(at_once, len(waiting)))]
        for sequence in replica.step(new):
            assert sequence.request.row not in ended
            ended[sequence.request.row] = sequence
        if not waiting and replica.scheduler.num_sequences == 0:
            return ended
    raise AssertionError("the scheduler makes no progress")
