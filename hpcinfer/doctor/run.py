"""One run of the doctor on a rank: into the world, examine, and rank 0 prints."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from hpcinfer.comm.bootstrap import World
from hpcinfer.comm.mpi_library import load_mpi
from hpcinfer.doctor.companion import Companion
from hpcinfer.doctor.examine import PART_S, DoctorOptions, examine
from hpcinfer.doctor.facts import Facts, judge
from hpcinfer.doctor.finding import Finding, red, red_error
from hpcinfer.doctor.report import Report, report_json, report_text
from hpcinfer.doctor.roll_call import GRACE_S
from hpcinfer.doctor.start import LINGER_S, START_S, enter, never_met
from hpcinfer.errors import CommunicationError, ExitCode
from hpcinfer.launch.env import LaunchEnvironment
from hpcinfer.launch.report import Place, end_all, end_with

FAREWELL_S = 0.5
"""By so much rank 0 ends later than the others, where it ends with an exit code."""


def run_doctor(options: DoctorOptions, environment: LaunchEnvironment, place: Place, *, as_json: bool = False) -> int:
    """Examine, and print the report on rank 0. Collective; MPI is finalized afterwards.

    Args:
        place: filled in as soon as the world is up.
        as_json: one JSON object in place of the table.

    Returns:
        The exit code: 1 on rank 0 where something is red, else 0.
    """
    with Companion() as companion:
        return _Run(options, environment, place, companion, as_json).run()


class _Run:
    def __init__(
        self, options: DoctorOptions, environment: LaunchEnvironment, place: Place, companion: Companion, as_json: bool
    ) -> None:
        self._options = options
        self._environment = environment
        self._place = place
        self._companion = companion
        self._as_json = as_json
        self._began_s = time.monotonic()
        self._facts = Facts()

    def run(self) -> int:
        environment = self._environment
        unmet = self._report([never_met(environment)], environment.expected_ranks, max(len(environment.nodes), 1))
        self._companion.watch(START_S, self._text(unmet) if environment.launcher_rank == 0 else "")
        world, self._facts.notes = enter(environment, self._place)
        if world is None:
            return ExitCode.DONE
        try:
            examine(
                world, self._options, environment, self._facts, begin=lambda part: self._begin(part, world),
                on_failure=lambda error: self._give_up(error, world),
            )
        except CommunicationError as error:
            self._give_up(error, world)
            raise
        code = ExitCode.DONE
        if world.rank == 0:
            report = self._report(judge(self._facts), world.size, world.num_nodes)
            self._print(report)
            code = ExitCode.FAILED if report.has_reds else ExitCode.DONE
        _leave(world, code)
        return code

    def _begin(self, part: str, world: World) -> None:
        """From here on this rank may be stuck in `part`; the companion then says what is known by now."""
        self._facts.part = part
        text = ""
        if world.rank == 0:
            findings = [*judge(self._facts), _no_answer(part, self._place)]
            text = self._text(self._report(findings, world.size, world.num_nodes))
        self._companion.watch(PART_S + GRACE_S, text)

    def _give_up(self, error: CommunicationError, world: World) -> None:
        """Ranks stopped answering: rank 0 says what is known, and ends all."""
        if world.rank == 0:
            findings = [*judge(self._facts), red_error(f"stuck: {self._facts.part}", error)]
            self._print(self._report(findings, world.size, world.num_nodes))
            end_all(self._place, ExitCode.FAILED)
        else:
            time.sleep(LINGER_S)
            end_with(error, self._place)

    def _report(self, findings: Sequence[Finding], num_ranks: int, num_nodes: int) -> Report:
        return Report(
            num_ranks=num_ranks, num_nodes=num_nodes, job=self._options.job, seconds=time.monotonic() - self._began_s,
            findings=tuple(findings),
        )

    def _text(self, report: Report) -> str:
        if self._as_json:
            return report_json(report) + "\n"
        return report_text(report, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ) + "\n"

    def _print(self, report: Report) -> None:
        sys.stdout.write(self._text(report))
        sys.stdout.flush()


def _leave(world: World, code: int) -> None:
    """End MPI. With an exit code rank 0 is the last: srun -K1 kills ranks that are still ending, and reports that instead."""
    world.close()
    if world.mpi_comm is not None:
        load_mpi().Finalize()
        time.sleep(FAREWELL_S if code else 0)


def _no_answer(part: str, place: Place) -> Finding:
    return red(
        f"stuck: {part}", f"{place} got no answer for {PART_S + GRACE_S:g} s",
        f"a driver, a file system or the network does not answer on {place.host}: look at dmesg and df there, or leave it "
        f"out: sbatch --exclude={place.host}",
    )
