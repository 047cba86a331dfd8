"""The examination on every rank: facts are gathered part by part, and rank 0 gets those of all ranks."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from hpcinfer.comm.bootstrap import World
from hpcinfer.comm.mpi_library import describe_mpi
from hpcinfer.config.job import JobConfig
from hpcinfer.config.load import load_job
from hpcinfer.doctor.devices import DeviceFacts, gather_device, gpus_usable, judge_devices
from hpcinfer.doctor.facts import Facts
from hpcinfer.doctor.fabric import gather_fabric
from hpcinfer.doctor.file_probe import gather_storage, nearest_folder
from hpcinfer.doctor.finding import RankPlace, red_error
from hpcinfer.doctor.launch import gather_launch, gather_login
from hpcinfer.doctor.limits import gather_clock, gather_limits
from hpcinfer.doctor.memory import gather_memory, num_ranks_needed
from hpcinfer.doctor.model import gather_files, gather_model
from hpcinfer.doctor.network import gather_network
from hpcinfer.doctor.ports import SYS
from hpcinfer.doctor.roll_call import GRACE_S, roll_call
from hpcinfer.doctor.space import expected_writes, gather_space
from hpcinfer.doctor.versions import gather_versions, judge_versions
from hpcinfer.errors import CommunicationError, ConfigError, HpcinferError, LaunchError
from hpcinfer.launch.env import LaunchEnvironment

TRANSFER_S = 20.0
"""A transfer of the probes that takes longer is stuck."""
PART_S = 50.0
"""So long rank 0 waits for ranks that are somewhere in a file system."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DoctorOptions:
    """What is asked for. Equal on all ranks, but for `sys_root`."""

    job: str = ""
    """Path of a job file; "": only the machine is examined."""
    overrides: tuple[str, ...] = ()
    """For the job: "section.key=value"."""
    sys_root: str = str(SYS)
    """Root of the kernel's tree of devices."""


def examine(
    world: World,
    options: DoctorOptions,
    environment: LaunchEnvironment,
    facts: Facts,
    *,
    begin: Callable[[str], None],
    on_failure: Callable[[CommunicationError], None],
) -> None:
    """Gather everything into rank 0's `facts`. Collective.

    Args:
        facts: each part is there as soon as it was gathered, so that what is known can be told where ranks stop answering.
        begin: called with the name of each part before it.
        on_failure: called on another thread where GPUs stop answering.

    Raises:
        CommunicationError: ranks stopped answering.
    """
    begin("job file")
    channel = world.channel
    world.deadline_s = TRANSFER_S
    if world.size > 1:
        channel.deadline_s = PART_S + 2 * GRACE_S
    facts.job_path, facts.overrides = options.job, options.overrides
    facts.job, facts.job_error = channel.broadcast(_read_job(options) if world.rank == 0 else None)
    facts.places = name_places(channel.all_gather((world.host, world.node_index, world.local_rank)))
    place = facts.places[world.rank]
    begin("machine")
    _gather_launch(world, environment, facts, place)
    device = _gather_machine(world, options, environment, facts, place)
    begin("network")
    roll_call(world, facts.places, "the network", deadline_s=PART_S)
    _use_gpus(world, facts, on_failure)
    facts.network = channel.gather(gather_network(world, facts.places))
    begin("output")
    _gather_output(world, facts)
    if facts.job is not None:
        begin("job")
        _gather_job(world, facts.job, facts, place, device)


def name_places(seen: list[tuple[str, int, int]]) -> list[RankPlace]:
    """Places of ranks from (host, number of the node, local rank) of each. Nodes of one host name are told apart."""
    nodes_of = collections.defaultdict(set)
    for host, node, _ in seen:
        nodes_of[host].add(node)
    return [
        RankPlace(rank=rank, host=f"{host}#{node}" if len(nodes_of[host]) > 1 else host, node=node, local_rank=local_rank)
        for rank, (host, node, local_rank) in enumerate(seen)
    ]


def _read_job(options: DoctorOptions) -> tuple[JobConfig | None, HpcinferError | None]:
    if not options.job:
        return None, None
    try:
        return load_job(options.job, options.overrides), None
    except HpcinferError as error:
        return None, error


def _gather_launch(world: World, environment: LaunchEnvironment, facts: Facts, place: RankPlace) -> None:
    if world.mpi_comm is not None:
        facts.launch = world.channel.gather(gather_launch(place, environment, world.size))
    elif environment.launcher == "none":
        facts.login = gather_login()


def _gather_machine(
    world: World, options: DoctorOptions, environment: LaunchEnvironment, facts: Facts, place: RankPlace
) -> DeviceFacts:
    channel = world.channel
    on_cpu = facts.device_setting == "cpu"
    device = DeviceFacts(place=place, num_visible=0) if on_cpu else gather_device(place, environment)
    mpi = describe_mpi() if world.mpi_comm is not None else ""
    versions = gather_versions(place, mpi=mpi, has_gpu=device.has_gpu)
    fabric = gather_fabric(place, gpu_pci=device.pci, sys_root=Path(options.sys_root))
    roll_call(world, facts.places, "devices", deadline_s=PART_S)
    facts.devices, facts.versions = channel.gather(device), channel.gather(versions)
    facts.fabric, facts.limits = channel.gather(fabric), channel.gather(gather_limits(place))
    facts.clocks = channel.gather(gather_clock(channel, place))
    return device


def _use_gpus(world: World, facts: Facts, on_failure: Callable[[CommunicationError], None]) -> None:
    """Transfers are tried between GPUs, where there is nothing against it."""
    usable = None
    if world.rank == 0:
        findings = judge_devices(facts.devices, setting=facts.device_setting) + judge_versions(facts.versions)
        usable = gpus_usable(findings, facts.devices)
    if not world.channel.broadcast(usable):
        return
    world.watch(on_failure)
    with _as_note(facts, "NCCL"):
        world.use_device("cuda")


@contextlib.contextmanager
def _as_note(facts: Facts, check: str) -> Iterator[None]:
    """An error that all ranks find together is a finding."""
    try:
        yield
    except (ConfigError, LaunchError) as error:
        if not error.agreed:
            raise
        facts.notes.append(red_error(check, error))


def _gather_output(world: World, facts: Facts) -> None:
    target = Path("." if facts.job is None else facts.job.data.output)

    def meet() -> None:
        roll_call(world, facts.places, f"the file system of {target}", deadline_s=PART_S)

    facts.storage = world.channel.gather(gather_storage(world.channel, facts.places, target, meet=meet))
    if world.rank == 0:
        facts.space = gather_space(nearest_folder(target))


def _gather_job(world: World, job: JobConfig, facts: Facts, place: RankPlace, device: DeviceFacts) -> None:
    channel = world.channel
    mine = gather_files(place, Path(job.model.path), world.num_nodes) if place.local_rank == 0 else None
    roll_call(world, facts.places, f"the files of {job.model.path}", deadline_s=PART_S)
    seen = channel.gather(mine)
    if world.rank == 0:
        facts.files = [each for each in seen if each is not None]
        facts.model = gather_model(job)
        if facts.model.prompts_error is None:
            try:
                facts.writes = expected_writes(job, facts.model.num_rows)
            except HpcinferError as error:
                facts.notes.append(red_error("output: run", error))
    num_local = num_ranks_needed(job) if facts.login is not None else world.local_size
    facts.memory = channel.gather(gather_memory(
        place, num_local_ranks=num_local, gpu_free_bytes=device.free_bytes if device.has_gpu else None
    ))
