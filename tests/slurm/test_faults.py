"""One task of a job array is disturbed at a random moment, in every way that a cluster knows; the others go on, and the run completes."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator

import pytest

from hpcinfer.config.job import RunSection
from hpcinfer.data.ledger.run_directory import create_or_open
from hpcinfer.data.ledger.writers import WriterIdentity, register_writer
from tests.faults.shim.harness import identity
from tests.conftest import rotation_of
from tests.runs import assert_same, read_outputs, run_demo
from tests.slow_runs import write_job
from tests.slurm import cluster as slurm_cluster
from tests.slurm import fault_record
from tests.slurm.disturbed import FAULTS, LOST_AFTER_S, DisturbedRun, Victim, Watch
from tests.slurm.jobs import logs, wait_for
from tests.waiting import until

NUM_ROWS = 130
ROUNDS = 5
"""Of each kind in `make test-full`, and one of one kind in CI: round 0 while the ranks start, the others in one quarter each of
`GENERATION_S`."""
STARTING_S, GENERATION_S = 6.0, 10.0
STANDSTILL_S = RunSection().heartbeat_s
"""The ranks left alone finish a step at least so often: with less, the heartbeat of an ordinary run would miss no beat. (Here heartbeats
are written every 0.2 s, so that they can be seen.)"""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All rounds of all kinds, or (in CI) one round of the kind whose turn it is."""
    if "fault" in metafunc.fixturenames:
        rounds = [(fault, number) for fault in FAULTS for number in range(ROUNDS)]
        if not metafunc.config.getoption("full"):
            rounds = [random.Random(rotation_of(metafunc.config)).choice(rounds)]
        metafunc.parametrize(("fault", "number"), rounds)


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> list[str]:
    return write_job(tmp_path_factory.mktemp("prompts"), NUM_ROWS, max_tokens=lambda row: 25 + row % 20)


@pytest.fixture(scope="module")
def undisturbed(job, tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    run_demo(output, [*job, "parallel.tp=1"])
    return read_outputs(output)


@pytest.fixture(scope="module")
def seven_nodes() -> Iterator[slurm_cluster.Cluster]:
    """Room for three tasks of two nodes, and one to spare; between SIGTERM and SIGKILL as long as it is by default."""
    if not slurm_cluster.can_have_namespaces():
        pytest.skip("nodes of their own need root, and unshare, nsenter, ip (iproute2)")
    with slurm_cluster.start(7, namespaces=True, kill_wait_s=30, lost_after_s=LOST_AFTER_S) as running:
        yield running


@pytest.fixture
def nodes(seven_nodes) -> Iterator[slurm_cluster.Cluster]:
    """All seven, idle; a test that fails leaves its jobs and lost nodes to nobody."""
    yield seven_nodes
    for node in seven_nodes.nodes:
        seven_nodes.set_link(node, up=True)
    while seven_nodes.run("squeue", "--noheader").stdout.strip():
        seven_nodes.run("scancel", f"--user={seven_nodes.user}", check=False)
        time.sleep(0.2)
    for node, state in seven_nodes.node_states().items():
        if state.startswith(("down", "drain")):
            seven_nodes.set_node(node, "resume")
    wait_for(lambda: {state.rstrip("*") for state in seven_nodes.node_states().values()} == {"idle"})


@pytest.mark.timeout(400)
def test_the_others_go_on(fault, number, nodes, workplace, job, undisturbed, rotation, pytestconfig):
    seed = f"{rotation} {fault} {number}"
    print(f"seed {seed!r}")  # of a failed round; pytest shows it
    rng = random.Random(seed)
    tp = 2 if fault == "other node down" else 1 + (number + list(FAULTS).index(fault)) % 2
    found = {"fault": fault, "round": number, "seed": seed, "layout": f"tp{tp}", "passed": False, "problem": ""}
    try:
        disturb(nodes, workplace, job, undisturbed, tp, number, rng, found)
        found["passed"] = True
    except BaseException as error:
        found["problem"] = str(error).splitlines()[0]
        raise
    finally:
        if (path := pytestconfig.getoption("slurm_faults")) and "rows_done" in found:
            fault_record.add(path, found)


def disturb(nodes, folder, job, undisturbed, tp: int, number: int, rng: random.Random, found: dict) -> None:
    """One round. What is found goes into `found`, as far as it gets."""
    by_limit = found["fault"] == "time limit"  # comes up to 30 s after it is asked for, which makes the moment random enough
    with Watch(folder / "run") as watch:
        run = DisturbedRun(nodes, folder, job, tp=tp, step_s=0.15 if by_limit else 0.05)
        run.wait_for_start()
        began_s = time.monotonic()
        if number:
            run.wait_for_rows()
        quarter_s = GENERATION_S / (ROUNDS - 1)
        moment_s = rng.uniform((number - 1) * quarter_s, number * quarter_s) if number else rng.uniform(0, STARTING_S)
        time.sleep(0 if by_limit else moment_s)
        chosen = rng.choice(sorted(run.tasks()))
        task = run.tasks()[chosen]
        victim = Victim(
            run=run, reference=f"{run.job}_{chosen}", job=task["JobId"], nodes=names(nodes, task["NodeList"], task["BatchHost"]),
            number=number, rng=rng,
        )
        others = {each["JobId"] for each in run.tasks().values()} - {victim.job}
        watch.fault()
        acts = FAULTS[found["fault"]](victim)
        found |= {"what": next(acts), "rows_done": run.rows_done(), "load": round(os.getloadavg()[0], 1)}
        came_s = time.monotonic()
        found["moment_s"] = round(came_s - began_s, 1)
        assert not run.is_complete, "the fault came too late"
        next(acts, None)
        wait_for(lambda: run.is_complete, within_s=200)
        found["recovery_s"] = round(time.monotonic() - came_s, 1)
        run.wait()
    found["lives"] = len(run.identities(victim.job))
    for phase in ("before", "after"):
        found[f"standstill_{phase}_s"] = round(max(pulse.longest_s[phase] for pulse in watch.of(others)), 2)
    found["idle_s"] = round(max(pulse.idle_s for pulse in watch.of(others)), 1)
    report = f"{found}\n{run.say()}"
    assert_same(read_outputs(run.output), undisturbed)
    ends = {each["JobId"]: (each["JobState"], each["ExitCode"]) for each in run.tasks().values()}
    expected = {each: ("COMPLETED", "0:0") for each in {victim.job, *others}}
    if found["fault"] == "cancelled":
        expected[victim.job] = ("CANCELLED", ends[victim.job][1])
        assert run.tasks()[chosen]["Restarts"] == "0" and found["lives"] <= 1, report
    assert ends == expected, report
    assert all(each["Restarts"] == "0" for each in run.tasks().values() if each["JobId"] in others), report
    assert len(watch.of(others)) == 2 and all(pulse.num_beats > 20 for pulse in watch.of(others)), report
    assert found["standstill_after_s"] < STANDSTILL_S, report
    wait_for(lambda: not any(run.processes(each)["rank"] for each in ends), within_s=30)


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_row_longer_than_the_time_limit(nodes, workplace, tmp_path):
    """USR1 comes 30 s or more before the limit of a minute. Short rows are then finished, the long one is cut short when the time is
    over, and the next life goes on with it: every token of the output was drawn once, over all lives.
    """
    long_row, num_tokens, step_s = 2, 480, 0.14
    job = write_job(tmp_path, 30, max_tokens=lambda row: num_tokens if row == long_row else 25 + row % 20)
    assert num_tokens * step_s > 60
    # A warning comes with one of Slurm's looks at limits: the next one, when there is work, but not yet when the job begins.
    wait_for(lambda: 18 < nodes.next_limit_check_s() < 22)
    run = DisturbedRun(nodes, workplace, job, tp=2, tasks=1, step_s=step_s, limit="1", slurm={"signal_s": 30})
    run.wait(within_s=250)
    task = nodes.job(run.job)
    assert (task["JobState"], task["ExitCode"]) == ("COMPLETED", "0:0"), run.say()
    lives = run.identities(task["JobId"])
    assert len(lives) == int(task["Restarts"]) + 1 >= 2, run.say()
    summaries = [json.loads(path.read_text()) for path in sorted(workplace.glob("summary-*.json"))]
    assert len(summaries) == len(lives), "a life was killed before it could drain"
    log = logs(workplace)
    for life in range(1, len(lives)):
        assert f"life {life}: not complete; it is requeued and goes on" in log, log
    assert "cut short and kept as partial rows" in log, log
    output = read_outputs(run.output)
    drawn = sum(summary["counters"]["begun"] + summary["counters"]["decode_tokens"] for summary in summaries)
    assert drawn == sum(len(token_ids) for token_ids, _, _ in output.values()) == sum(each["output_tokens"] for each in summaries)
    assert len(output[long_row, 0][0]) == num_tokens
    run_demo(tmp_path / "undisturbed", [*job, "parallel.tp=1"])
    assert_same(output, read_outputs(tmp_path / "undisturbed"))


def test_the_watch_sees_a_standstill(tmp_path):
    """What `test_the_others_go_on` measures: the pause of a writer at work, and neither loading nor what came before."""
    writer = register_writer(create_or_open(tmp_path / "run", identity(10)), WriterIdentity(job="7"), interval_s=0)
    with Watch(tmp_path / "run") as watch:
        writer.set_state("loading")
        time.sleep(1.0)
        writer.set_state("running")
        watch.fault()
        for pause_s in (0.05, 0.7, 0.05):
            time.sleep(pause_s)
            writer.step_finished()
        until(lambda: watch.of({"7"})[0].num_beats >= 3)
    [pulse] = watch.of({"7"})
    assert pulse.longest_s["after"] >= 0.6 and pulse.longest_s["before"] == 0.0 and not watch.of({"8"})


def names(cluster: slurm_cluster.Cluster, node_list: str, batch_host: str) -> tuple[str, ...]:
    """The nodes of a job, its batch host first."""
    found = cluster.run("scontrol", "show", "hostnames", node_list).stdout.split()
    return (batch_host, *(name for name in found if name != batch_host))
