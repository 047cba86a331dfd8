"""Records of the runs of `bench overlap`, one start a variant, for `hpcinfer trace FOLDER --start NAME`."""

from __future__ import annotations

import re
from pathlib import Path

from hpcinfer.bench.overlap_cases import Scenario, Variant
from hpcinfer.comm.bootstrap import World
from hpcinfer.data.ledger.writers import boot_id
from hpcinfer.observe.trace import Recorder
from hpcinfer.observe.trace_file import save_trace
from hpcinfer.parallel.groups import ReplicaGroups
from hpcinfer.runner.tracing import FOLDER, measure_clock, trace_header


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
        header = trace_header(
            self._world, groups, self.recorder, started=start_name(scenario, variant), complete=True
        )
        header.update(clock=[self._clock], same_clock=self._clock["boot_id"] == boot_id())
        save_trace(self._folder, self.recorder, header)


def start_name(scenario: Scenario, variant: Variant) -> str:
    """What a variant's trace is called: "tp2-prefill-512-two-batch"."""
    return re.sub(r"[^a-z0-9]+", "-", f"{scenario.name} {variant.name}".lower()).strip("-")
