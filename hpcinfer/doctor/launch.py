"""How the ranks were started: the MPI library against its launcher, ranks a node, cores a rank."""

from __future__ import annotations

import collections
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence

import torch

from hpcinfer.comm.mpi_library import describe_mpi
from hpcinfer.doctor.finding import Finding, RankPlace, absent, by_value, green, places_of, red, who, yellow
from hpcinfer.launch.env import LaunchEnvironment
from hpcinfer.launch.guard import srun_flavour
from hpcinfer.launch.start import clean_environ

_TIMEOUT_S = 20.0
_ASK_MPI = (
    "import mpi4py; mpi4py.rc.thread_level = 'multiple'\n"
    "from mpi4py import MPI\n"
    "print(MPI.get_vendor()[0], '.'.join(map(str, MPI.get_vendor()[1])), MPI.Query_thread() == MPI.THREAD_MULTIPLE, sep='|')"
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LaunchFacts:
    """How one rank was started."""

    place: RankPlace
    launcher: str
    """srun or mpiexec."""
    expected_ranks: int
    """That the launcher started."""
    world_size: int
    """Ranks that MPI knows of."""
    mpi: str
    """Library and version."""
    flavour: str
    """What srun was told with --mpi; "" under another launcher."""
    cores: frozenset[int]
    """That this rank may run on."""
    machine_cores: int
    """Of the whole node."""
    threads: int
    """That torch computes with."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoginFacts:
    """What a process that nothing launched can know of MPI and Slurm, without starting either in itself."""

    mpi: str = ""
    """Library and version; "" where it does not load."""
    mpi_error: str = ""
    threads: bool = True
    """MPI grants THREAD_MULTIPLE."""
    has_srun: bool = False
    flavours: tuple[str, ...] = ()
    """What `srun --mpi=list` lists; empty where it does not say."""


def gather_launch(place: RankPlace, environment: LaunchEnvironment, world_size: int) -> LaunchFacts:
    """This rank's own. MPI is up."""
    return LaunchFacts(
        place=place, launcher=environment.launcher, expected_ranks=environment.expected_ranks, world_size=world_size,
        mpi=describe_mpi(),
        flavour=environment.variables.get("SLURM_MPI_TYPE", "") if environment.launcher == "srun" else "",
        cores=frozenset(os.sched_getaffinity(0)), machine_cores=os.cpu_count() or 1, threads=torch.get_num_threads(),
    )


def gather_login() -> LoginFacts:
    """Asks processes of their own, which may fail or hang."""
    mpi = _run([sys.executable, "-c", _ASK_MPI], clean_environ(os.environ))
    name, _, rest = mpi.stdout.strip().rpartition("\n")[2].partition("|")
    version, _, threads = rest.partition("|")
    answered = mpi.returncode == 0 and bool(rest)
    has_srun = shutil.which("srun") is not None
    listed = _run(["srun", "--mpi=list"], os.environ) if has_srun else None
    return LoginFacts(
        mpi=f"{name} {version}" if answered else "",
        mpi_error="" if answered else _last_line(mpi.stderr),
        threads=threads == "True", has_srun=has_srun,
        flavours=listed_flavours(listed.stdout + listed.stderr) if listed is not None and listed.returncode == 0 else (),
    )


def listed_flavours(text: str) -> tuple[str, ...]:
    """The plugins in the answer of `srun --mpi=list`, whose form differs between versions of Slurm."""
    words = re.findall(r"\b(none|pmi2|pmix(?:_v\d+)?|cray_shasta|openmpi)\b", text)
    return tuple(dict.fromkeys(words))


def judge_login(facts: LoginFacts, *, num_ranks: int) -> list[Finding]:
    """MPI and Slurm as a login node sees them. `num_ranks`: that a replica of the job needs."""
    findings = [_login_mpi(facts, num_ranks)]
    if not facts.has_srun:
        return [*findings, absent("srun --mpi", "no srun on PATH")]
    wanted = srun_flavour(facts.mpi)
    if not facts.flavours:
        return [*findings, absent("srun --mpi", "srun finds no cluster here")]
    listed = ", ".join(facts.flavours)
    if facts.mpi and not any(flavour.startswith(wanted) for flavour in facts.flavours):
        finding = red(
            "srun --mpi", f"{facts.mpi} needs --mpi={wanted}; Slurm here has {listed}",
            f"install an MPI that takes one of them into this environment, or have the {wanted} plugin added to Slurm",
        )
    else:
        finding = green("srun --mpi", f"{listed}; {facts.mpi or 'this MPI'} takes --mpi={wanted}")
    return [*findings, finding]


def _login_mpi(facts: LoginFacts, num_ranks: int) -> Finding:
    if not facts.mpi:
        # A single process needs none.
        make = red if facts.flavours or num_ranks > 1 else yellow
        fix = "pip install '.[mpich]', or load the site's MPI module"
        return make("MPI library", f"it does not load: {facts.mpi_error}", fix)
    if not facts.threads:
        return red(
            "MPI library", f"{facts.mpi} does not grant THREAD_MULTIPLE, which transfers in the background need",
            "use an MPI built with thread support",
        )
    return green("MPI library", f"{facts.mpi}, THREAD_MULTIPLE")


def judge_world(facts: Sequence[LaunchFacts]) -> list[Finding]:
    """The MPI world against what the launcher started. `facts`: of all ranks, in rank order."""
    first = facts[0]
    findings = [green("MPI library", f"{first.mpi}, THREAD_MULTIPLE")]
    flavour = f" --mpi={first.flavour}" if first.flavour else ""
    if first.world_size != first.expected_ranks:
        return [*findings, red(
            "MPI world",
            f"{first.launcher}{flavour} started {first.expected_ranks} ranks; MPI has worlds of {first.world_size}",
            f"start with srun --mpi={srun_flavour(first.mpi)} and keep one MPI per environment"
            if first.launcher == "srun" else "use the mpiexec that came with this environment's MPI",
        )]
    return [*findings, green("MPI world", f"one world of {first.world_size} ranks, started by {first.launcher}{flavour}")]


def judge_ranks_a_node(facts: Sequence[LaunchFacts]) -> Finding:
    """Whether all nodes have as many ranks."""
    counts = collections.Counter(each.place.node for each in facts)
    firsts = {each.place.node: each.place for each in reversed(facts)}
    sizes = by_value((firsts[node], count) for node, count in counts.items())
    if len(sizes) == 1:
        size = next(iter(sizes))
        return green("ranks a node", f"{len(counts)} node{'s' if len(counts) > 1 else ''} x {size} ranks")
    text = "; ".join(f"{size} on {', '.join(place.host for place in places)}" for size, places in sizes.items())
    fewest = sizes[min(sizes)]
    return yellow(
        "ranks a node", text, "srun --ntasks-per-node=N gives every node as many; replicas then lie alike on all", fewest
    )


def judge_cores(facts: Sequence[LaunchFacts]) -> list[Finding]:
    """Cores that ranks are bound to, and threads on them."""
    nodes: dict[int, list[LaunchFacts]] = collections.defaultdict(list)
    for each in facts:
        nodes[each.place.node].append(each)
    crowded = [ranks for ranks in nodes.values() if _is_crowded(ranks)]
    if crowded:
        ranks = crowded[0]
        cores = frozenset().union(*(each.cores for each in ranks))
        binding = red(
            "CPU binding",
            f"{who(places_of(ranks))} share {len(cores)} of the node's {ranks[0].machine_cores} cores",
            "give every rank cores of its own: #SBATCH --cpus-per-task=C, and srun --cpus-per-task=C as well (since Slurm "
            "22.05 it is not inherited); under Open MPI's mpiexec --bind-to none",
            [each.place for ranks in crowded for each in ranks],
        )
    else:
        binding = green("CPU binding", "; ".join(_cores_text(facts)))
    return [binding, _judge_threads(nodes)]


def _is_crowded(ranks: list[LaunchFacts]) -> bool:
    """Ranks of a node that are bound to fewer cores than they are, or to the very same few, while the machine has more."""
    groups = collections.Counter(each.cores for each in ranks)
    return any(len(cores) < count and len(cores) < ranks[0].machine_cores for cores, count in groups.items())


def _cores_text(facts: Sequence[LaunchFacts]) -> list[str]:
    counts = by_value((each.place, len(each.cores)) for each in facts)
    if len(counts) == 1:
        return [f"{next(iter(counts))} cores for each rank to run on"]
    return [f"{count} cores for {who(places)}" for count, places in counts.items()]


def _judge_threads(nodes: dict[int, list[LaunchFacts]]) -> Finding:
    worst: tuple[float, list[LaunchFacts], int, int] | None = None
    for ranks in nodes.values():
        cores = len(frozenset().union(*(each.cores for each in ranks)))
        threads = sum(each.threads for each in ranks)
        if threads > cores and (worst is None or threads / cores > worst[0]):
            worst = (threads / cores, ranks, threads, cores)
    if worst is None:
        fewest = min((each.threads for ranks in nodes.values() for each in ranks))
        return green("threads", f"{fewest} compute thread{'s' if fewest > 1 else ''} a rank, a core for each")
    _, ranks, threads, cores = worst
    fix = (
        f"set OMP_NUM_THREADS={cores // len(ranks)} and OMP_WAIT_POLICY=passive" if cores >= len(ranks)
        else f"start at most {cores} ranks a node"
    )
    return yellow(
        "threads", f"{len(ranks)} ranks with {threads} threads on {cores} cores of {ranks[0].place.host}", fix,
        places_of(ranks),
    )


def _run(command: list[str], environ: Mapping[str, str]) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False,
            stdin=subprocess.DEVNULL, env=environ,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer within {_TIMEOUT_S:g} s")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
