"""One run of the doctor on this rank: into the world, examine, rank 0 prints, all ranks end alike."""

from __future__ import annotations

import os
import sys
import time

from hpcinfer.doctor.examine import DoctorOptions, examine
from hpcinfer.doctor.facts import Facts, judge
from hpcinfer.doctor.finding import Finding, red_error
from hpcinfer.doctor.report import Report, report_json, report_text
from hpcinfer.doctor.start import LINGER_S, enter, stuck_in_start
from hpcinfer.errors import CommunicationError, ExitCode
from hpcinfer.launch.env import LaunchEnvironment
from hpcinfer.launch.report import Place, end_all, end_with


def run_doctor(options: DoctorOptions, environment: LaunchEnvironment, place: Place, *, as_json: bool = False) -> int:
    """Examine, print the report on rank 0, and return the exit code: 1 with a red finding, else 0. Collective.

    Args:
        place: filled in as soon as the world is up.
        as_json: one JSON object in place of the table.
    """
    began_s = time.monotonic()

    def report(findings: list[Finding], num_ranks: int, num_nodes: int) -> Report:
        seconds = time.monotonic() - began_s
        return Report(num_ranks=num_ranks, num_nodes=num_nodes, job=options.job, seconds=seconds, findings=tuple(findings))

    never_met = report([stuck_in_start(environment)], environment.expected_ranks, max(len(environment.nodes), 1))
    world, notes = enter(environment, place, stuck_report=_text(never_met, as_json))
    if world is None:
        return ExitCode.DONE
    facts = Facts(notes=notes)

    def give_up(error: CommunicationError) -> None:
        """Ranks stopped answering: rank 0 says what is known, and ends all."""
        if world.rank == 0:
            _print(report([*judge(facts), red_error(f"stuck: {facts.part}", error)], world.size, world.num_nodes), as_json)
            end_all(place, ExitCode.FAILED)
        else:
            time.sleep(LINGER_S)
            end_with(error, place)

    try:
        examine(world, options, environment, facts, on_failure=give_up)
    except CommunicationError as error:
        give_up(error)
        raise
    code = None
    if world.rank == 0:
        whole = report(judge(facts), world.size, world.num_nodes)
        _print(whole, as_json)
        code = ExitCode.FAILED if whole.has_reds else ExitCode.DONE
    code = world.channel.broadcast(code)
    world.close()
    return code


def _text(report: Report, as_json: bool) -> str:
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return (report_json(report) if as_json else report_text(report, colour=colour)) + "\n"


def _print(report: Report, as_json: bool) -> None:
    sys.stdout.write(_text(report, as_json))
    sys.stdout.flush()
