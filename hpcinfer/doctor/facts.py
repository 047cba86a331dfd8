"""The facts of all ranks, part by part, and what they come to. Pure: nothing is asked of the machine here."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence

from hpcinfer.config.job import JobConfig
from hpcinfer.doctor.devices import DeviceFacts, judge_devices
from hpcinfer.doctor.fabric import FabricFacts, fastest_bytes_per_s, judge_fabric
from hpcinfer.doctor.file_probe import StorageFacts
from hpcinfer.doctor.finding import Finding, RankPlace, absent, red, red_error
from hpcinfer.doctor.launch import LaunchFacts, LoginFacts, judge_cores, judge_login, judge_ranks_a_node, judge_world
from hpcinfer.doctor.limits import ClockFacts, LimitFacts, judge_clocks, judge_limits
from hpcinfer.doctor.memory import MemoryFacts, judge_layout, judge_memory, num_ranks_needed, spans_nodes
from hpcinfer.doctor.model import FileFacts, ModelFacts, judge_model
from hpcinfer.doctor.network import NetworkFacts, judge_network
from hpcinfer.doctor.space import SpaceFacts, Writes, judge_space
from hpcinfer.doctor.storage import judge_storage
from hpcinfer.doctor.versions import VersionFacts, judge_versions
from hpcinfer.errors import HpcinferError
from hpcinfer.launch.guard import srun_flavour
from hpcinfer.parallel.mesh import Mesh


@dataclasses.dataclass(kw_only=True, slots=True)
class Facts:
    """What rank 0 knows so far; lists are of all ranks, in rank order. None: not gathered, or not yet."""

    notes: list[Finding] = dataclasses.field(default_factory=list)
    """Found on the way: where ranks did not become one world, or stopped answering."""
    part: str = "start"
    """What is being gathered, for the report of ranks that stop answering."""
    places: list[RankPlace] = dataclasses.field(default_factory=list)
    job: JobConfig | None = None
    job_error: HpcinferError | None = None
    job_path: str = ""
    overrides: tuple[str, ...] = ()
    login: LoginFacts | None = None
    """Of a process that nothing launched."""
    launch: list[LaunchFacts] | None = None
    versions: list[VersionFacts] | None = None
    devices: list[DeviceFacts] | None = None
    fabric: list[FabricFacts] | None = None
    network: list[NetworkFacts] | None = None
    storage: list[StorageFacts] | None = None
    space: SpaceFacts | None = None
    writes: Writes | None = None
    model: ModelFacts | None = None
    files: list[FileFacts] | None = None
    """Of the first rank of each node."""
    memory: list[MemoryFacts] | None = None
    limits: list[LimitFacts] | None = None
    clocks: list[ClockFacts] | None = None

    @property
    def device_setting(self) -> str:
        """engine.device of the job."""
        return "auto" if self.job is None else self.job.engine.device


def judge(facts: Facts) -> list[Finding]:
    """All rows of the table, in its order."""
    mesh, layout = _layout(facts)
    return [
        *facts.notes, *_launch(facts), *_machine(facts), *_network(facts, mesh), *_output(facts), *_job(facts), *layout,
        *_memory(facts, mesh), *_limits(facts),
    ]


def _launch(facts: Facts) -> list[Finding]:
    if facts.launch is not None:
        return [*judge_world(facts.launch), judge_ranks_a_node(facts.launch), *judge_cores(facts.launch)]
    if facts.login is None:
        return []
    findings = judge_login(facts.login, num_ranks=1 if facts.job is None else num_ranks_needed(facts.job))
    return [*findings, absent("all ranks", "one process sees no ranks, links and other nodes", _with_ranks(facts))]


def _with_ranks(facts: Facts) -> str:
    """The command that examines what one process cannot see."""
    ranks = 2 if facts.job is None else num_ranks_needed(facts.job)
    words = ["hpcinfer", "doctor", *([facts.job_path] if facts.job_path else [])]
    words += [word for override in facts.overrides for word in ("--set", override)]
    if not facts.login.flavours:
        fixed = facts.job is not None and facts.job.parallel.dp  # another number of ranks would be refused
        return f"mpiexec -n {ranks if fixed else max(ranks, 2)} {shlex.join(words)}"
    return f"srun --mpi={srun_flavour(facts.login.mpi)} {_two_nodes(facts.job, ranks)} {shlex.join(words)}"


def _two_nodes(job: JobConfig | None, ranks: int) -> str:
    """Ranks for srun: as many as the job has; where it takes as many replicas as there are, one or more on each of two nodes."""
    if job is not None and job.parallel.dp or ranks > 8:
        return f"-N {min(ranks, max(2, -(-ranks // 8)))} -n {ranks}"
    return f"-N 2 --ntasks-per-node={ranks}"


def _machine(facts: Facts) -> list[Finding]:
    findings = [] if facts.versions is None else judge_versions(facts.versions)
    if facts.devices is not None:
        findings += judge_devices(facts.devices, setting=facts.device_setting)
        findings += _too_few_gpus(facts)
    return findings + ([] if facts.fabric is None else judge_fabric(facts.fabric))


def _too_few_gpus(facts: Facts) -> list[Finding]:
    """A start without a launcher puts all its ranks on this machine."""
    if facts.job is None or not _starts_here(facts) or facts.device_setting == "cpu":
        return []
    visible, needed = facts.devices[0].num_visible, num_ranks_needed(facts.job)
    if not 0 < visible < needed:
        return []
    return [red(
        "GPUs", f"{visible} here, and a start of this job has {needed} ranks",
        'run it in a Slurm job with a GPU for each rank, lower parallel.tp, pp or sp, or set engine.device = "cpu"',
    )]


def _network(facts: Facts, mesh: Mesh | None) -> list[Finding]:
    if facts.network is None:
        return []
    return judge_network(
        facts.network, fabric_bytes_per_s=fastest_bytes_per_s(facts.fabric or []),
        replica_spans_nodes=mesh is not None and spans_nodes(mesh, _job_places(facts)),
    )


def _output(facts: Facts) -> list[Finding]:
    findings = [] if facts.storage is None else judge_storage(facts.storage, is_output=facts.job is not None)
    return findings + ([] if facts.space is None else judge_space(facts.space, facts.writes))


def _job(facts: Facts) -> list[Finding]:
    if facts.job_error is not None:
        return [red_error("job file", facts.job_error)]
    if facts.job is None or facts.model is None or facts.files is None:
        return []
    return judge_model(facts.model, facts.files)


def _layout(facts: Facts) -> tuple[Mesh | None, list[Finding]]:
    if facts.job is None or facts.model is None or facts.model.model is None:
        return None, []
    if facts.launch is None and facts.login is None:
        return None, [absent("layout", "the ranks are not one world")]
    return judge_layout(facts.job, facts.model.model, _job_places(facts))


def _memory(facts: Facts, mesh: Mesh | None) -> list[Finding]:
    if mesh is None or facts.memory is None:
        return []
    if facts.login is not None and not _starts_here(facts):
        return [absent("weights and K/V", "the memory of compute nodes is not seen from here")]
    memory: Sequence[MemoryFacts] = facts.memory
    if facts.login is not None:
        memory = [dataclasses.replace(memory[0], place=place) for place in _job_places(facts)]
    return judge_memory(facts.job, facts.model.model, mesh, memory)


def _limits(facts: Facts) -> list[Finding]:
    findings = []
    if facts.limits is not None:
        findings += judge_limits(
            facts.limits, has_fabric=any(each.ports for each in facts.fabric or []),
            has_gpu=any(each.has_gpu for each in facts.devices or []),
            output_bytes=facts.writes.likely_bytes / 2 if facts.writes else 0.0,
        )
    return findings + ([] if facts.clocks is None else [judge_clocks(facts.clocks)])


def _starts_here(facts: Facts) -> bool:
    """Nothing launched this process, and no Slurm would: a run starts its ranks on this machine."""
    return facts.login is not None and not facts.login.flavours


def _job_places(facts: Facts) -> list[RankPlace]:
    """The ranks that there are; of a process that nothing launched, those that a run would start."""
    if facts.login is None:
        return facts.places
    host = facts.places[0].host
    return [RankPlace(rank=rank, host=host, local_rank=rank) for rank in range(num_ranks_needed(facts.job))]
