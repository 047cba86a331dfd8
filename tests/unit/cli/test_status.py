"""`hpcinfer status` as people and scripts see it."""

from __future__ import annotations

import io
import json
import math

import pytest

from hpcinfer.cli.main import main
from hpcinfer.cli.status import to_text, watch
from hpcinfer.data.ledger.run_directory import create_or_open
from hpcinfer.data.ledger.status import StatusReader, read_status
from hpcinfer.errors import ResumableError
from hpcinfer.data.ledger.writers import Leaving, WriterIdentity, register_writer
from tests.faults.shim.harness import POLICY, Replica, identity


@pytest.fixture
def run(tmp_path):
    return create_or_open(tmp_path / "run", identity(50))


def register(run, job: str, **facts):
    writer = register_writer(run, WriterIdentity(job=job, host=f"node{job}", layout="tp 2", **facts))
    writer.set_state(
        "running", running_s=100.0, rows_per_s_now=2.5, output_tokens_per_s_now=100.0 if job != "3" else 7.0, rows_ok=4, rows_claimed=10
    )
    return writer


def test_the_table(run):
    for job in ("1", "2", "3"):
        writer = register(run, job, restart_count=int(job))
    register(run, "4").leave(Leaving.DRAINED)
    text = to_text(read_status(run))
    lines = text.splitlines()
    assert "50 in all: 0 ok" in lines[1] and "7.5 rows/s and 207 tokens/s now" in lines[2] and "ETA 6.7 s" in lines[3]
    header = next(line for line in lines if "restarts" in line)
    rows = {line.split()[1]: line for line in lines[lines.index(header) + 1 :] if "tp 2" in line}
    assert set(rows) == set("1234")
    assert rows["2"].split()[1:3] == ["2", "node2"] and rows["2"].split()[-1] == "2" and "running" in rows["2"]
    assert "left: drained" in rows["4"] and "2.5" not in rows["4"]
    assert lines[-1] == f"  straggler {writer.id} (job 3, node3): 7 tokens/s, the median of 3 is 100"


def test_of_many_writers_those_at_work_are_shown(run):
    for _ in range(30):
        register(run, "1").leave(Leaving.DRAINED)
    register(run, "2")
    text = to_text(read_status(run))
    assert text.count("node2") == 1 and "node1" not in text and "30 writers that left or died" in text


def test_json_has_everything_and_no_infinities(run, capsys):
    register(run, "3", cluster="c", restart_count=1).leave(Leaving.DRAINED)
    assert main(["status", str(run.path), "--json"]) == 3
    status = json.loads(capsys.readouterr().out)
    assert status["eta_s"] is None and status["num_left"] == 50
    [writer] = status["writers"]
    assert (writer["reason"], writer["num_segments"], writer["identity"]["restart_count"]) == ("drained", 0, 1)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_watching_until_the_run_is_complete(run, stream):
    shown, slept = stream(), []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            assert Replica(run.path, 50, policy=POLICY).live()

    assert watch(StatusReader(run), shown, every_s=7.0, sleep=sleep) == 0
    assert slept == [7.0, 7.0]
    text = shown.getvalue()
    if stream is Terminal:
        assert text.count("\x1b[2J") == 3 and text.count("in all") == 3
    else:
        assert "\x1b" not in text and len(text.splitlines()) == 3
        assert "0/50 rows" in text.splitlines()[0] and text.splitlines()[-1].endswith("complete")


def test_watching_ends_with_ctrl_c(run):
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    shown = io.StringIO()
    assert watch(StatusReader(run), shown, every_s=1.0, as_json=True, sleep=interrupt) == 3
    assert json.loads(shown.getvalue())["eta_s"] is None


def test_a_watch_outlives_a_file_system_that_does_not_answer(run, capsys):
    class Stale(StatusReader):
        problems = [ResumableError("the run directory cannot be used now")]

        def read(self):
            if self.problems:
                raise self.problems.pop()
            return super().read()

    assert Replica(run.path, 50, policy=POLICY).live()
    assert watch(Stale(run), io.StringIO(), every_s=1.0, sleep=lambda seconds: None) == 0
    assert "cannot be used now" in capsys.readouterr().err


def test_a_complete_run(run, capsys):
    assert Replica(run.path, 50, policy=POLICY).live()
    assert main(["status", str(run.path), "--watch"]) == 0
    assert "50/50 rows" in capsys.readouterr().out
    assert not math.isinf(read_status(run).eta_s)


@pytest.mark.parametrize("every", ["nan", "inf", "-1", "0"])
def test_times_between_looks_that_cannot_be(tmp_path, every, capsys):
    assert main(["status", str(tmp_path), "--watch", "--every", every]) == 2
    assert "0.1 to 86400 seconds" in capsys.readouterr().err


def test_what_a_trial_left_is_named(run):
    assert "trial.h5" not in to_text(read_status(run))
    run.trial.write_bytes(b"")
    assert f"what a trial left is {run.trial}" in to_text(read_status(run))
