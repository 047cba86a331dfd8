"""A rank of `hpcinfer ...` in which every step takes SECONDS more, so that rows are in work for a while on any machine.

usage: slow_rank.py SECONDS run JOB.toml --set ...
"""

from __future__ import annotations

import sys
import time

from hpcinfer.cli.main import main
from hpcinfer.comm.mpi_library import load_mpi
from hpcinfer.launch.env import LaunchEnvironment


def plant(seconds: float) -> None:
    if LaunchEnvironment.from_environ().launcher != "none":
        load_mpi()  # before torch, as `hpcinfer run` does: slurm/README.md says why
    from hpcinfer.pipeline.runner import StageRunner

    sound = StageRunner.run

    def run(self, prepared, **settings):
        time.sleep(seconds)
        return sound(self, prepared, **settings)

    StageRunner.run = run


if __name__ == "__main__":
    seconds, *argv = sys.argv[1:]
    plant(float(seconds))
    sys.exit(main(argv))
