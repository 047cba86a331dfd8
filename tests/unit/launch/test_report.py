"""Reports of errors, and what becomes of the exit code. Ends of whole worlds are in tests/ranks/test_launch.py."""

import signal
import sys

import pytest

from hpcinfer.errors import ConfigError, LaunchError, ResumableError
from hpcinfer.launch import report
from hpcinfer.launch.report import Place, run_as_rank


@pytest.fixture
def alarms(monkeypatch):
    """Seconds of the kernel alarms that were set, and which none of these tests may let ring."""
    seconds = []
    monkeypatch.setattr(report.signal, "alarm", seconds.append)
    return seconds


def fails_with(error):
    def main(place):
        raise error

    return main


@pytest.mark.parametrize(("value", "code"), [(None, 0), (0, 0), (3, 3)])
def test_return_value_is_the_exit_code(value, code):
    assert run_as_rank(lambda place: value, Place()) == code


def test_our_error_alone(capfd):
    code = run_as_rank(fails_with(ConfigError("a", found="b", fix="c")), Place(rank=0, size=1, host="h"))
    assert code == 2
    head = "hpcinfer: error on rank 0 of 1 on host h\n"
    assert capfd.readouterr().err == head + "ConfigError: a\n  found: b\n  fix:   c\n"


def test_another_error_has_a_traceback(capfd):
    assert run_as_rank(fails_with(ValueError("no")), Place()) == 1
    text = capfd.readouterr().err
    assert "Traceback" in text and "ValueError: no" in text


@pytest.mark.parametrize(
    ("error", "code"),
    [(ResumableError("full"), 3), (KeyboardInterrupt(), 130), (SystemExit(4), 4), (SystemExit("why"), 1)],
)
def test_one_rank_ends_all(monkeypatch, alarms, capfd, error, code):
    monkeypatch.setattr(report.time, "sleep", lambda seconds: None)
    kills, codes = [], []
    monkeypatch.setattr(report.os, "kill", lambda pid, number: kills.append(number))
    assert run_as_rank(fails_with(error), Place(rank=1, size=2, host="h", abort=codes.append)) == code
    assert codes == [code]
    assert alarms == [report.ABORT_TIMEOUT_S]
    assert kills == [signal.SIGKILL], "an abort that returns is followed by the end of this rank"


@pytest.mark.parametrize(("rank", "printed"), [(0, 1), (1, 0)])
def test_an_agreed_error_is_printed_by_rank_0(alarms, capfd, rank, printed):
    error = ConfigError("same everywhere")
    error.agreed = True

    def abort(code):
        raise AssertionError("all ranks end by themselves")

    assert run_as_rank(fails_with(error), Place(rank=rank, size=2, host="h", abort=abort)) == 2
    assert capfd.readouterr().err.count("same everywhere") == printed
    assert alarms == [report.AGREED_TIMEOUT_S]


@pytest.mark.parametrize(
    ("variables", "cancelled"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "4"}, ["7.2"]),
        ({"PMI_RANK": "0", "PMI_SIZE": "4"}, []),  # an mpiexec ends all with the first that dies
    ],
)
def test_a_rank_without_mpi_ends_all(monkeypatch, alarms, variables, cancelled):
    """It cannot tell the others, which wait for it in MPI's start."""
    steps, kills = [], []
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setattr(report.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(report.subprocess, "run", lambda command, **more: steps.append(command[-1]))
    monkeypatch.setattr(report.os, "kill", lambda pid, number: kills.append(number) or sys.exit("killed"))
    with pytest.raises(SystemExit, match="killed"):
        run_as_rank(fails_with(LaunchError("no MPI")))
    assert (steps, kills, alarms) == (cancelled, [signal.SIGKILL], [report.INIT_TIMEOUT_S])


def test_exit_0_is_no_error():
    assert run_as_rank(fails_with(SystemExit(0)), Place(size=2)) == 0


def test_place_before_mpi_is_what_the_launcher_says(monkeypatch):
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "3")
    place = Place.from_environ()
    assert (place.rank, place.size) == (1, 3)
