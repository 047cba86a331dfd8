"""A rank of `hpcinfer ...` whose device has less memory than was thought: rank VICTIM runs out of it in a decode of tick TICK or
later, as long as the K/V cache has more than LIMIT tokens.

usage: out_of_memory_rank.py VICTIM TICK LIMIT run JOB.toml --set ...
"""

from __future__ import annotations

import sys

import torch

from hpcinfer.cli.main import main
from hpcinfer.launch.env import LaunchEnvironment
from hpcinfer.pipeline.runner import StageRunner


def plant(first_tick: int, limit: int) -> None:
    sound = StageRunner.run

    def run(self, prepared, **settings):
        layout = self._kv.layout
        tokens = (self._kv.num_blocks - 1) * layout.block_size
        if prepared.step.tick >= first_tick and tokens > limit:
            raise torch.OutOfMemoryError(f"planted: {tokens} tokens")
        return sound(self, prepared, **settings)

    StageRunner.run = run


if __name__ == "__main__":
    victim, tick, limit, *argv = sys.argv[1:]
    if LaunchEnvironment.from_environ().launcher_rank == int(victim):
        plant(int(tick), int(limit))
    sys.exit(main(argv))
