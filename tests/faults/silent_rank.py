"""Ranks for test_silent_rank: they do nothing that needs another one, and send heartbeats."""

from __future__ import annotations

import sys
import time

from hpcinfer.comm.bootstrap import start_world
from hpcinfer.launch.process import die_with_parent
from hpcinfer.launch.report import Place, end_with, run_as_rank


def main(place: Place) -> int:
    world = start_world(deadline_s=1.0)
    place.rank, place.size, place.host, place.abort = world.rank, world.size, world.host, world.abort
    world.watch(lambda error: end_with(error, place), heartbeat_s=0.1)
    world.progress.mark.set(812)
    world.channel.barrier()
    if world.rank == 0:
        print("ready", flush=True)
    end_s = time.monotonic() + float(sys.argv[1])
    while time.monotonic() < end_s:
        time.sleep(0.01)
    world.close()
    return 0


if __name__ == "__main__":
    die_with_parent()
    sys.exit(run_as_rank(main))
