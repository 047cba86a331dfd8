"""A rank for test_launch: starts like the real one, writes its pid, and then misbehaves as its argument says."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from hpcinfer.errors import ConfigError
from hpcinfer.launch.process import die_with_parent
from hpcinfer.launch.report import Place, run_as_rank
from hpcinfer.launch.signals import DrainFlag


def main(place: Place) -> int:
    from hpcinfer.comm.bootstrap import split, start_world
    from hpcinfer.parallel.agree import agree_or_raise

    mode, folder = sys.argv[1], Path(sys.argv[2])
    if mode == "early" and place.rank == 1:
        raise ConfigError("one rank fails before MPI is up")
    world = start_world(deadline_s=60)
    place.rank, place.size, place.host, place.abort = world.rank, world.size, world.host, world.abort
    everyone = split(world, range(world.size), "everyone")
    (folder / f"rank{world.rank}").write_text(f"{os.getpid()} {os.getppid()}")
    world.channel.barrier()
    last = world.rank == world.size - 1
    if mode == "error" and last:
        raise ConfigError("the thing is wrong", found="3 apples", fix="take 4")
    if mode == "bug" and last:
        return 1 // 0
    if mode == "exit" and last:
        sys.exit(3)
    if mode == "agreed":
        def fail() -> None:
            raise ConfigError("the job file is wrong", found="line 3", fix="correct it")

        agree_or_raise(world.channel, fail)
    if mode == "fine":
        everyone.close()
        world.close()
        return 0
    if mode == "code":
        everyone.close()
        world.close()
        return 3
    if mode == "drain":
        drain = DrainFlag()
        drain.install()
        (folder / f"ready{world.rank}").touch()
        while not drain:
            time.sleep(0.02)
        print(f"drained rank {world.rank} by {drain.reason}", flush=True)
        world.channel.barrier()
        everyone.close()
        world.close()
        return 3
    while True:  # all the others wait in a collective, as ranks do when one of them fails
        everyone.barrier()
        time.sleep(0.01)


if __name__ == "__main__":
    die_with_parent()
    sys.exit(run_as_rank(main))
