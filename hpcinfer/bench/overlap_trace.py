"""Records of the runs of `bench overlap`, one start a variant, for `hpcinfer trace FOLDER --start NAME`."""

from __future__ import annotations

import platform
import re
import time
from pathlib import Path

import numpy as np

import hpcinfer
from hpcinfer.bench.overlap_cases import Scenario, Variant
from hpcinfer.comm.bootstrap import World
from hpcinfer.data.ledger.writers import boot_id
from hpcinfer.observe.trace import Recorder
from hpcinfer.observe.trace_file import save_trace
from hpcinfer.parallel.groups import ReplicaGroups
from hpcinfer.runner.tracing import FOLDER, measure_clock


class RunTraces:
    """The recorder of one rank, used for one run after the other. Every method is collective over the world."""

    def __init__(self, folder: Path, world: World) -> None:
        self.recorder = Recorder()
        self._folder = folder / FOLDER
        self._world = world
        world.progress.recorder = self.recorder
        self._clock = measure_clock(world.channel)

    def begin(self) -> None:
        """Forget what was recorded before this run."""
        self.recorder.restart()

    def save(self, scenario: Scenario, variant: Variant, groups: ReplicaGroups) -> None:
        """Write the run that ends here."""
        world, mesh, end_s = self._world, groups.mesh, time.perf_counter()
        members = {item.name: [0, 1] for item in (*groups.communicators(), groups.control) if item.size > 1}
        members.update({link.name: [1, 0] for link in groups.tokens.values()})  # the sampler is rank 0 of this link
        header = {
            "rank": world.rank, "host": world.host, "boot_id": boot_id(), "started": start_name(scenario, variant),
            "layout": str(mesh), "communicators": members,
            "coordinates": {"replica": mesh.replica, "stage": mesh.stage, "lane": mesh.lane, "tp": mesh.tp_rank},
            "start_s": self.recorder.start_s, "end_s": end_s, "clock": [self._clock],
            "start_unix_s": time.time() - (end_s - self.recorder.start_s), "end_unix_s": time.time(),
            "same_clock": self._clock["boot_id"] == boot_id(), "complete": True,
            "versions": {
                "hpcinfer": hpcinfer.__version__, "python": platform.python_version(), "numpy": np.__version__,
            },
        }
        save_trace(self._folder, self.recorder, header)


def start_name(scenario: Scenario, variant: Variant) -> str:
    """What a variant's trace is called: "tp2-prefill-512-two-batch"."""
    return re.sub(r"[^a-z0-9]+", "-", f"{scenario.name} {variant.name}".lower()).strip("-")
