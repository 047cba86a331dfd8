"""hpcinfer: offline batch inference with large language models over MPI ranks.

    import hpcinfer
    summary = hpcinfer.run("job.toml", ["parallel.tp=2"])

    engine = hpcinfer.Engine("datasets/demo-model")
    for generation in engine.generate(["17+25="]):
        print(generation.text)
"""

from __future__ import annotations

import typing

__version__ = "0.1.0"

if typing.TYPE_CHECKING:
    from hpcinfer.engine.engine import Engine
    from hpcinfer.request import Generation, SamplingParams, TaskParams
    from hpcinfer.runner.start import run

__all__ = ["Engine", "Generation", "SamplingParams", "TaskParams", "run"]

_HOMES = {
    "Engine": "hpcinfer.engine.engine",
    "Generation": "hpcinfer.request",
    "SamplingParams": "hpcinfer.request",
    "TaskParams": "hpcinfer.request",
    "run": "hpcinfer.runner.start",
}


def __getattr__(name: str):
    # Verbs that need no model must not pay for torch: the public names are loaded when they are first used.
    if name not in _HOMES:
        raise AttributeError(f"module 'hpcinfer' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
