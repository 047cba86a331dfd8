"""A rank of `hpcinfer ...` in which every step takes SECONDS more, so that rows are in work for a while on any machine.

usage: slow_rank.py SECONDS run JOB.toml --set ...
"""

from __future__ import annotations

import sys
import time

from hpcinfer.cli.main import main
from hpcinfer.pipeline.runner import StageRunner


def plant(seconds: float) -> None:
    sound = StageRunner.run

    def run(self, prepared, **settings):
        time.sleep(seconds)
        return sound(self, prepared, **settings)

    StageRunner.run = run


if __name__ == "__main__":
    seconds, *argv = sys.argv[1:]
    plant(float(seconds))
    sys.exit(main(argv))
