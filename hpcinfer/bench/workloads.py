"""Fixed workloads: prompts of random token ids, output lengths, all from a fixed seed."""

from __future__ import annotations

import dataclasses

import numpy as np

from hpcinfer.errors import UsageError
from hpcinfer.request import Request, SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Lengths are drawn uniformly between both ends, both included."""

    num_prompts: int
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]

    @property
    def longest(self) -> int:
        """Most tokens that a sequence can reach."""
        return self.prompt_tokens[1] + self.output_tokens[1]


WORKLOADS = {
    "W1": Workload(num_prompts=64, prompt_tokens=(16, 128), output_tokens=(128, 128)),
    "W2": Workload(num_prompts=64, prompt_tokens=(512, 512), output_tokens=(16, 16)),
    "W3": Workload(num_prompts=64, prompt_tokens=(16, 128), output_tokens=(8, 256)),
}


def find_workload(name: str) -> Workload:
    """A workload by name. Raises UsageError with the valid names."""
    if name not in WORKLOADS:
        raise UsageError(f"no workload {name!r}", fix=f"valid: {', '.join(WORKLOADS)}")
    return WORKLOADS[name]


def make_requests(workload: Workload, vocab_size: int, seed: int = 0) -> list[Request]:
    """Greedy requests that ignore the end of sequence."""
    rng = np.random.default_rng(seed)
    requests = []
    for row in range(workload.num_prompts):
        num_prompt = int(rng.integers(workload.prompt_tokens[0], workload.prompt_tokens[1], endpoint=True))
        num_output = int(rng.integers(workload.output_tokens[0], workload.output_tokens[1], endpoint=True))
        requests.append(
            Request(
                row=row,
                prompt_token_ids=rng.integers(0, vocab_size, num_prompt).astype(np.int32),
                sampling=SamplingParams(max_tokens=num_output, ignore_eos=True),
            )
        )
    return requests
