"""An engine inside this process: prompts in, generations out as they finish. One rank, no run directory, no MPI."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from hpcinfer.comm.bootstrap import local_world
from hpcinfer.config.job import EngineSection
from hpcinfer.config.model import ModelConfig
from hpcinfer.config.parallel import ParallelConfig
from hpcinfer.data.stop_text import StopTexts
from hpcinfer.data.tokenize import Tokenizer
from hpcinfer.engine.build import build_replica
from hpcinfer.engine.replica_plan import plan_replica
from hpcinfer.engine.memory import available_bytes
from hpcinfer.engine.outcome import failed_generation, generation_of
from hpcinfer.engine.profile import meter_of
from hpcinfer.engine.requests import RequestBuilder
from hpcinfer.errors import ConfigError, RowError, UsageError
from hpcinfer.models.checkpoint import Checkpoint
from hpcinfer.models.weights import load_stage
from hpcinfer.observe.metrics import PhaseClock
from hpcinfer.parallel.groups import build_groups
from hpcinfer.parallel.mesh import Mesh
from hpcinfer.request import Generation, Request, SamplingParams, TaskParams
from hpcinfer.sampling.grammar import Grammars

_QUEUE_DEPTH = 2
"""Requests kept ready, as a multiple of the sequences in work."""


class Engine:
    """A model loaded into this process.

        engine = Engine("datasets/demo-model")
        for generation in engine.generate(["17+25="], SamplingParams(max_tokens=8)):
            print(generation.row, generation.text)

    Args:
        model: a Hugging Face folder.
        dtype: float32, bfloat16, float16, or auto (the checkpoint's own).
        engine: device, batching and memory, see `EngineSection`.

    Raises:
        CheckpointError: the folder is incomplete or not supported.
        ConfigError: the model does not fit.
    """

    def __init__(self, model: str | Path, *, dtype: str = "auto", engine: EngineSection = EngineSection()) -> None:
        config = ModelConfig.from_folder(model)
        world = local_world()
        world.use_device(engine.device)
        groups = build_groups(world, Mesh())
        plan = plan_replica(
            config, ParallelConfig(), engine, groups, groups.control, dtype=dtype, device=world.device,
            available_bytes=available_bytes(world.device, num_local_ranks=1),
        )
        checkpoint = Checkpoint(model)
        self.clock = PhaseClock()
        self._tokenizer = Tokenizer(model) if (Path(model) / "tokenizer.json").is_file() else None
        grammars = Grammars(lambda: self._tokenizer, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids)
        self._replica = build_replica(
            plan, groups, clock=self.clock, load=lambda stage: load_stage(stage, checkpoint, world),
            meter=meter_of(world.device), grammars=grammars,
        )
        self._replica.stop_texts = StopTexts(self._tokenizer) if self._tokenizer else None
        self._vocab_size = config.vocab_size
        self._grammars = grammars
        self._is_generating = False
        self._queue_depth = _QUEUE_DEPTH * engine.max_sequences

    @property
    def scheduler(self):
        """The scheduler, for its counters."""
        return self._replica.scheduler

    def generate(
        self, prompts: Iterable[str | Sequence[int]], sampling: SamplingParams = SamplingParams(), task: TaskParams = TaskParams()
    ) -> Iterator[Generation]:
        """Generate for each prompt, or score or embed it; yield each generation as it finishes, in no fixed order.

        Args:
            prompts: strings, or sequences of token ids. Read only as far ahead as the engine needs, so it may be endless.
            sampling: for all of them.
            task: what is done with them.

        Yields:
            Generations; `row` is the number of the prompt, counted from 0. A prompt that cannot be run yields one with
            status FAILED and the reason.

        Raises:
            UsageError: another one's generations are not all taken yet: close it first.
        """
        if self._is_generating:
            raise UsageError(
                "the engine is generating for another call", found="an iterator of generate() that is neither at its end nor closed",
                fix="take all of its generations, close() it, or make another Engine",
            )
        self._is_generating = True
        waiting = iter(enumerate(prompts))
        builder = RequestBuilder(self._tokenizer, self._vocab_size, self._grammars, task=task)
        exhausted = False
        try:
            while not exhausted or not self._replica.is_idle:
                requests: list[Request] = []
                while not exhausted and self._replica.scheduler.num_sequences + len(requests) < self._queue_depth:
                    row, prompt = next(waiting, (None, None))
                    if row is None:
                        exhausted = True
                    else:
                        yield from self._accept(row, prompt, sampling, requests, builder)
                for ended in self._replica.step(requests):
                    yield generation_of(ended, self._tokenizer)
        finally:
            self._is_generating = False
            if not self._replica.is_idle:  # the caller stopped listening
                self._replica.step([], drain=True)

    def _accept(
        self, row: int, prompt: str | Sequence[int], sampling: SamplingParams, requests: list[Request], builder: RequestBuilder
    ) -> Iterator[Generation]:
        """Add the prompt's samples to `requests`, or yield a failed generation for each."""
        try:
            token_ids = self._token_ids(prompt)
            made = [
                builder.build(row=row, sample=sample, prompt_token_ids=token_ids, sampling=sampling)
                for sample in range(sampling.n)
            ]
            self._replica.scheduler.refuse(made[0])
        except (RowError, ConfigError) as error:
            yield from (failed_generation(row, sample, str(error)) for sample in range(sampling.n))
        else:
            requests += made

    def _token_ids(self, prompt: str | Sequence[int]) -> np.ndarray:
        if not isinstance(prompt, str):
            try:
                return self._checked(np.asarray(prompt))
            except (ValueError, TypeError, OverflowError) as error:
                raise RowError(f"a prompt is a string or a sequence of token ids: {error}") from error
        if self._tokenizer is None:
            raise RowError("the model folder has no tokenizer.json: give token ids")
        return self._tokenizer.encode(prompt)

    def _checked(self, token_ids: np.ndarray) -> np.ndarray:
        if token_ids.ndim != 1 or (len(token_ids) and token_ids.dtype.kind not in "iu"):
            raise RowError("a prompt is a string or a sequence of token ids")
        if len(token_ids) and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < self._vocab_size:
            raise RowError(
                f"token ids from {token_ids.min()} to {token_ids.max()} are not in the vocabulary of {self._vocab_size}"
            )
        return token_ids.astype(np.int32)
