"""What the replica agreed on at its start, and what the scheduler counts."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerLimits:
    """What the replica agreed on at its start."""

    num_blocks: int
    """Pages of the K/V cache on every rank, page 0 (never owned) included."""
    block_size: int
    """Tokens a page holds."""
    max_batch_tokens: int
    """Most tokens of one lane in a step."""
    max_sequences: int
    """Most sequences in work at once, on all lanes together."""
    max_context: int
    """Longest sequence in tokens, prompt and output together."""
    lag: int
    """Tick n uses the results up to tick n - lag."""
    eos_token_ids: frozenset[int]
    """The model's own end-of-sequence ids."""
    num_lanes: int = 1
    """Lanes of the replica (sequence parallelism). With several a step is all prefill or all decode."""
    sp_min_tokens: int = 0
    """A sequence with fewer tokens to prefill is prefilled by its owner lane alone. Read only with several lanes."""
    two_batch_tokens: int = 0
    """From this many tokens in its fullest lane on, a step is divided into two parts; 0 switches it off."""
    divide_decodes: bool = True
    """Whether that holds for steps without prefill too."""
    run_ahead: bool = False
    """A sequence is computed again in the tick after the one that draws its token, which the host then does not know yet: the
    token stays on the device. A token too many, drawn after an end that was not known yet, is dropped."""

    @property
    def num_in_flight(self) -> int:
        """Steps that share the sequences in work: each sequence is in one of so many ticks."""
        return self.lag - self.run_ahead

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values fit into the pages of a lane."""
        return (self.num_blocks - 1) * self.block_size


@dataclasses.dataclass(slots=True)
class SchedulerCounters:
    """What happened on all lanes together, for the summary and for tests that must see a feature at work."""

    ticks: int = 0
    begun: int = 0
    """Sequences of which something was computed."""
    microbatches: int = 0
    """Parts of steps; the lanes of a part count once."""
    prefill_tokens: int = 0
    decode_tokens: int = 0
    decode_microbatches: int = 0
    """Microbatches with at least one decode in them."""
    decode_context_tokens: int = 0
    """Tokens whose keys and values decodes have read, summed over all decodes."""
    chunked_prefills: int = 0
    """Chunks that ended before the end of a sequence's known tokens."""
    preemptions: int = 0
    max_in_flight: int = 0
    """Most steps in flight at once."""
    shared_prefills: int = 0
    """Sequences whose prefill, spread over the lanes, began."""
    shared_tokens: int = 0
    """Tokens computed in such prefills."""
    local_prefills_under_sp: int = 0
    """Sequences whose prefill by their owner lane alone began although there are several lanes."""
    tokens_ahead: int = 0
    """Decodes whose input token the host did not know."""
    dropped_tokens: int = 0
    """Tokens drawn after the end of their sequence."""
    divided_steps: int = 0
    """Steps of two parts."""
    divided_prompts: int = 0
    """Steps of two parts of which the second goes on with a prompt that the first began."""
    empty_lane_steps: int = 0
    """Lanes without tokens, summed over all microbatches."""
