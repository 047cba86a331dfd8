"""Fixed workloads: prompts of random token ids, output lengths, all from a fixed seed."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from hpcinfer.errors import UsageError
from hpcinfer.request import Request, SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Lengths are drawn uniformly between both ends, both included, or, where a mean is given, from a log-normal distribution with
    that mean, cut off at both ends."""

    num_prompts: int
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    prompt_mean: float = 0.0
    output_mean: float = 0.0

    @property
    def longest(self) -> int:
        """Most tokens that a sequence can reach."""
        return self.prompt_tokens[1] + self.output_tokens[1]


WORKLOADS = {
    "W1": Workload(num_prompts=64, prompt_tokens=(16, 128), output_tokens=(128, 128)),
    "W2": Workload(num_prompts=64, prompt_tokens=(512, 512), output_tokens=(16, 16)),
    "W3": Workload(num_prompts=64, prompt_tokens=(16, 128), output_tokens=(8, 256)),
    # Lengths like those of ShareGPT's conversations.
    "chat": Workload(
        num_prompts=1000, prompt_tokens=(4, 2048), output_tokens=(4, 1024), prompt_mean=227.0, output_mean=188.0
    ),
}
_SIGMA = 1.0
"""Of the logarithm of a length: long tails, as conversations have."""


def find_workload(name: str, num_prompts: int = 0) -> Workload:
    """A workload by name, or INxOUT: so many tokens in and out for every prompt.

    Args:
        num_prompts: in the place of the workload's own number; 0 keeps it (INxOUT has 64).

    Raises:
        UsageError: no such workload; the valid names.
    """
    lengths = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
    if lengths is not None:
        prompt, output = map(int, lengths.groups())
        workload = Workload(num_prompts=64, prompt_tokens=(prompt, prompt), output_tokens=(output, output))
    elif name in WORKLOADS:
        workload = WORKLOADS[name]
    else:
        raise UsageError(f"no workload {name!r}", fix=f"valid: {', '.join(WORKLOADS)}, or INxOUT such as 1000x1000")
    return dataclasses.replace(workload, num_prompts=num_prompts) if num_prompts else workload


def make_requests(workload: Workload, vocab_size: int, seed: int = 0) -> list[Request]:
    """Greedy requests that ignore the end of sequence."""
    rng = np.random.default_rng(seed)
    requests = []
    for row in range(workload.num_prompts):
        num_prompt = _length(rng, workload.prompt_tokens, workload.prompt_mean)
        num_output = _length(rng, workload.output_tokens, workload.output_mean)
        requests.append(
            Request(
                row=row,
                prompt_token_ids=rng.integers(0, vocab_size, num_prompt).astype(np.int32),
                sampling=SamplingParams(max_tokens=num_output, ignore_eos=True),
            )
        )
    return requests


def _length(rng: np.random.Generator, ends: tuple[int, int], mean: float) -> int:
    if not mean:
        return int(rng.integers(ends[0], ends[1], endpoint=True))
    # The mean of a log-normal distribution is exp(mu + sigma**2 / 2).
    drawn = rng.lognormal(np.log(mean) - _SIGMA**2 / 2, _SIGMA)
    return int(np.clip(round(drawn), *ends))
