"""A rank for the doctor's tests: with the faults that its environment names, then `hpcinfer` as usual."""

from __future__ import annotations

import dataclasses
import os
import sys
import time

from hpcinfer.cli.main import main
from hpcinfer.doctor import examine, run

FAULT = "DOCTOR_TEST_FAULT"


def plant(fault: str) -> None:
    """Make this rank faulty."""
    if fault == "gpu":
        # A GPU that every rank of the host is given.
        real = examine.gather_device

        def one_gpu(place, environment):
            facts = real(place, environment)
            memory = {"total_bytes": 80 * 2**30, "free_bytes": 80 * 2**30}
            return dataclasses.replace(facts, num_visible=1, uuid="the-one", name="made up", **memory)

        examine.gather_device = one_gpu
    elif fault == "impatient":
        run.START_S, run.PART_S, examine.PART_S = 4.0, 2.0, 2.0
    elif fault == "silent":  # as with a dead file system
        examine.gather_files = lambda *_: time.sleep(60)
    elif fault == "late":
        time.sleep(60)


if __name__ == "__main__":
    for name in os.environ.get(FAULT, "").split():
        plant(name)
    sys.exit(main())
