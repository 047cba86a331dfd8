"""The first prompts of a finished run beside their generations, for a person to look at."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from hpcinfer.config.job import JobConfig
from hpcinfer.data.generations import GenerationFile
from hpcinfer.request import Generation, Status
from hpcinfer.runner.preflight import open_job_prompts

_WIDTH = 100


def example_lines(job: JobConfig, output: str, count: int) -> Iterator[str]:
    """A line for each of the first `count` rows that are there (first sample): prompt -> generation.

    Args:
        output: the merged generations.
    """
    with open_job_prompts(job) as reader, GenerationFile(output) as generations:
        firsts = (generation for generation in generations if generation.sample == 0)
        for generation in itertools.islice(firsts, count):
            row = next(reader.rows(generation.row, generation.row + 1))
            prompt = row.text if row.text is not None else row.token_ids
            yield f"  {_short(prompt)} -> {_short(_answer(generation, has_text=row.text is not None))}"


def _answer(generation: Generation, *, has_text: bool) -> object:
    if generation.status is Status.FAILED:
        return f"failed: {generation.error}"
    if generation.score is not None:
        return f"log-probability {generation.score.logprob:.4g}, perplexity {generation.score.perplexity:.4g}"
    if generation.embedding is not None:
        return f"{len(generation.embedding)} numbers: " + " ".join(f"{value:.4g}" for value in generation.embedding[:8])
    # An empty text is an answer too (a stop text at once); without a tokenizer there are token ids alone.
    return generation.text if has_text or generation.text else generation.token_ids


def _short(value: object) -> str:
    text = repr(value) if isinstance(value, str) else str(None if value is None else value.tolist())
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."
