"""What makes two starts the same run: input, model and sampling, each as small facts that a run directory can keep."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from hpcinfer.config.job import JobConfig
from hpcinfer.data.ledger.rounds import NO_TRUNCATION
from hpcinfer.errors import CheckpointError
from hpcinfer.request import SamplingParams, TaskParams

_FIRST_FIELDS = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop_token_ids", "ignore_eos")
"""Fields of SamplingParams that every run directory has. Later ones are left out where they have their default, so that runs that
were begun before they existed can go on."""

_WINDOW_BYTES = 4096
_WINDOWS = 64


def model_facts(job: JobConfig, dtype: str) -> dict[str, Any]:
    """Fields of the model that change the answers.

    Weights are recognised by their names, sizes and 64 evenly spread windows of each file, headers included: reading all
    of them would take as long as the run's own load.

    Args:
        dtype: what the model computes in.
    """
    folder = Path(job.model.path)
    return {
        "dtype": dtype,
        "config": _digest([folder / "config.json", folder / "generation_config.json"]),
        "tokenizer": _digest([folder / "tokenizer.json", folder / "tokenizer_config.json"]),
        "weights": _weights_digest(sorted(folder.glob("*.safetensors"))),
    }


def sampling_facts(job: JobConfig, max_context: int) -> dict[str, Any]:
    """Fields of the sampling that change the answers; `n` is the run's own (it sets the number of output rows)."""
    facts, defaults = (dataclasses.asdict(sampling) for sampling in (job.sampling, SamplingParams()))
    del facts["n"]
    kept = {name: value for name, value in facts.items() if name in _FIRST_FIELDS or value != defaults[name]}
    kept["max_context"] = max_context
    kept |= {"max_prompt_tokens": job.data.max_prompt_tokens} if job.data.max_prompt_tokens else {}
    kept |= {"truncate": job.data.truncate} if job.data.truncate != NO_TRUNCATION else {}
    return kept | _task_facts(job.task)


def _task_facts(task: TaskParams) -> dict[str, Any]:
    """What another task would find otherwise; nothing where tokens are generated, as all runs once did."""
    if task.kind == "embed":
        return {"task": task.kind, "pooling": task.pooling, "normalize": task.normalize}
    return {} if task.generates else {"task": task.kind, "continuation": task.continuation}


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _weights_digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    try:
        for path in files:
            with open(path, "rb") as file:
                size = path.stat().st_size
                digest.update(f"{path.name} {size}\n".encode())
                for window in range(_WINDOWS):
                    file.seek(max(0, size - _WINDOW_BYTES) * window // (_WINDOWS - 1))
                    digest.update(file.read(_WINDOW_BYTES))
    except OSError as error:
        raise CheckpointError("the weights cannot be read", found=str(error)) from error
    return digest.hexdigest()[:16]
