"""A site: what a cluster needs from every job, in a TOML file of its own (`slurm/sites/*.toml` are examples).

Found by name in ~/.config/hpcinfer/sites and among the examples, or by path; `--site` and the variable HPCINFER_SITE choose one.
Every key has its default here.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from hpcinfer.config.checks import has_control_characters
from hpcinfer.config.load import from_tables, read_toml
from hpcinfer.config.nccl import NcclSection, nccl_variables
from hpcinfer.errors import ConfigError

_TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}")
_OWN_OPTIONS = (
    "--array", "--nodes", "--ntasks", "--ntasks-per-node", "--cpus-per-task", "--gpus-per-node", "--time", "--signal", "--requeue",
    "--no-requeue", "--open-mode", "--output", "--job-name", "--dependency", "--mpi", "--partition", "--account", "--qos",
    "--constraint", "--mem", "--kill-on-bad-exit",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SlurmSection:
    """The `[slurm]` section: what sbatch and srun are told."""

    partition: str = ""
    """--partition. Default "": Slurm's default."""
    account: str = ""
    """--account. Default "": the user's own."""
    qos: str = ""
    """--qos. Default "": none."""
    constraint: str = ""
    """--constraint: features that nodes must have, such as "h100&ib". Default "": none."""
    time: str = "01:00:00"
    """Time limit of a job where `submit --time` gives none, in Slurm's forms (minutes, hours:minutes:seconds, days-hours ...)."""
    gpus_per_node: int = 0
    """GPUs of a node. Default 0: CPU only."""
    gpu_type: str = ""
    """The type in --gpus-per-node=TYPE:N, where the site wants one. Default "": none."""
    ranks_per_node: int = 0
    """Ranks on a node. Default 0: one a GPU; without GPUs one replica a node."""
    cores_per_rank: int = 0
    """--cpus-per-task, and threads of a rank. Default 0: Slurm's own choice; threads share the node's cores."""
    memory: str = ""
    """--mem of a node, such as "400G"; "0" takes all of it. Default "": Slurm's default."""
    mpi: str = "pmi2"
    """srun --mpi: pmi2 for MPICH and Intel MPI, pmix for Open MPI, cray_shasta for Cray MPICH; `srun --mpi=list` shows what the
    cluster has. Default pmi2."""
    options: tuple[str, ...] = ()
    """More options of sbatch, one a text: "--exclusive", "--comment=my project"."""
    srun_options: tuple[str, ...] = ()
    """More options of the srun that starts the ranks, such as "--cpu-bind=cores"."""
    requeue: bool = True
    """Whether jobs may requeue themselves. Where a site forbids it, every job submits a successor that waits for its end."""
    max_lives: int = 50
    """A job stops going on by itself after so many lives. Default 50."""
    signal_s: int = 120
    """Ranks are told so many seconds before the time limit: enough to commit what is being generated. Default 120."""
    array_nodes: int = 4
    """A start on more nodes than this whose nodes hold independent replicas becomes a job array. Default 4."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for text in (value,) if isinstance(value, str) else value if isinstance(value, tuple) else ():
                if has_control_characters(text):
                    raise ConfigError(
                        f"slurm.{field.name} = {text!r}", fix="a line of #SBATCH cannot carry line breaks and control characters"
                    )
        for name, least in (
            ("gpus_per_node", 0), ("ranks_per_node", 0), ("cores_per_rank", 0), ("max_lives", 1), ("signal_s", 1), ("array_nodes", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"slurm.{name} = {getattr(self, name)}", fix=f"give {least} or more")
        if self.signal_s > 65535:
            raise ConfigError(f"slurm.signal_s = {self.signal_s}", fix="Slurm takes at most 65535 seconds")
        if not re.fullmatch(r"\w+", self.mpi):
            raise ConfigError(f"slurm.mpi = {self.mpi!r}", fix="give a name from `srun --mpi=list`, such as pmi2 or pmix")
        if self.gpu_type and not self.gpus_per_node:
            raise ConfigError(f"slurm.gpu_type = {self.gpu_type!r} without GPUs", fix="set slurm.gpus_per_node too")
        check_time("slurm.time", self.time)
        _check_options("options", self.options)
        _check_options("srun_options", self.srun_options)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EnvironmentSection:
    """The `[environment]` section: how a job finds Python and its libraries. Where nothing is given, the Python that `submit` itself
    runs in is used.

    In venv, python, container and scratch.* $NAME and ${NAME} stand for variables of the job; all else is taken as it is.
    """

    modules: tuple[str, ...] = ()
    """Modules to load, in order."""
    venv: str = ""
    """A virtual environment to activate."""
    container: tuple[str, ...] = ()
    """A command before each rank's own, word for word: ["apptainer", "exec", "--nv", "/path/image.sif"]. It must leave the rank as
    the process that srun started (exec), or pass on signals."""
    python: str = ""
    """The interpreter. Default "": python3 of what is loaded, activated or contained."""
    setup: tuple[str, ...] = ()
    """Lines of bash, run as they are before anything else."""
    variables: dict[str, str] = dataclasses.field(default_factory=dict)
    """Variables to set where the user has not set them: UCX_*, FI_*, OMP_PROC_BIND and the like. NCCL_* belong to [nccl]."""

    def __post_init__(self) -> None:
        for name, value in self.variables.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or "\0" in value:
                raise ConfigError(f"environment.variables.{name} = {value!r}", fix="give a name of letters, digits and _, and a text")
            if name.startswith("NCCL_"):
                raise ConfigError(f"environment.variables.{name}", fix="settings of NCCL belong to [nccl], or [nccl.extra]")
        for name in ("modules", "container"):
            if "" in getattr(self, name):
                raise ConfigError(f"environment.{name} = {list(getattr(self, name))}", fix="leave out the empty text")
        if self.venv and self.container:
            raise ConfigError(
                "environment.venv and environment.container exclude each other", found="both are given",
                fix="a container has an environment of its own: name its interpreter in environment.python",
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScratchSection:
    """The `[scratch]` section: node-local disk, for what parallel file systems hate."""

    folder: str = ""
    """A folder on every node's own disk; a job makes its own inside, for temporary files and compiled kernels, and removes it.
    Default "": $SLURM_TMPDIR, else $TMPDIR, else /tmp."""
    environment_tar: str = ""
    """A tar of a virtual environment (or of conda-pack), with bin/ at its top: unpacked once on every node, and its Python used.
    For starts of many nodes, where importing Python from a parallel file system takes minutes. Default "": no."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A whole site file."""

    slurm: SlurmSection = dataclasses.field(default_factory=SlurmSection)
    environment: EnvironmentSection = dataclasses.field(default_factory=EnvironmentSection)
    scratch: ScratchSection = dataclasses.field(default_factory=ScratchSection)
    nccl: NcclSection = dataclasses.field(default_factory=NcclSection)

    def __post_init__(self) -> None:
        if self.scratch.environment_tar and (self.environment.venv or self.environment.container):
            raise ConfigError(
                "scratch.environment_tar is an environment beside the one in [environment]",
                found=f"environment.{'venv' if self.environment.venv else 'container'} is given too", fix="give one of the two",
            )


def nccl_environment(site: Site) -> dict[str, str]:
    """The NCCL_* variables that a site asks for: name -> value. They count from NCCL's first call on, and not before."""
    return nccl_variables(site.nccl)


def load_site(name: str, folders: Sequence[Path] | None = None) -> Site:
    """Read a site, by name or by path (what has a / or ends in .toml).

    Args:
        folders: where names are looked up, in this order; by default `site_folders()`.

    Raises:
        ConfigError: there is no such site, or its file is wrong; the message names it.
    """
    path = find_site(name, site_folders() if folders is None else folders)
    tables = read_toml(path, "the site file")
    try:
        return from_tables(Site, tables, "the site file")
    except ConfigError as error:
        raise ConfigError(f"{error.problem} (in the site file {path})", found=error.found, fix=error.fix) from error


def find_site(name: str, folders: Sequence[Path]) -> Path:
    """The file of a site."""
    if "/" in name or name.endswith(".toml"):
        return Path(name)
    for folder in folders:
        if name and (folder / f"{name}.toml").is_file():
            return folder / f"{name}.toml"
    known = sorted({file.stem for folder in folders for file in folder.glob("*.toml")})
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    raise ConfigError(
        f"no site {name!r}", found=f"looked in {', '.join(map(str, folders))}",
        fix=(f"did you mean {close[0]}? " if close else "") + f"known: {', '.join(known) or 'none'}; a path works too",
    )


def site_folders() -> tuple[Path, ...]:
    """The user's own sites, then the examples of a checkout, then those of an installation."""
    return (
        Path.home() / ".config" / "hpcinfer" / "sites",
        Path(__file__).resolve().parents[2] / "slurm" / "sites",
        Path(sys.prefix) / "share" / "hpcinfer" / "sites",
    )


def check_time(name: str, text: str) -> None:
    """Raise ConfigError unless `text` is a time limit in one of Slurm's forms."""
    if not _TIME.fullmatch(text):
        raise ConfigError(f"{name} = {text!r}", fix="write minutes, hours:minutes:seconds or days-hours:minutes:seconds: 04:00:00")


def time_limit_s(text: str) -> int:
    """Seconds of a time limit in Slurm's forms: "90" and "90:00" are minutes, "1-12" a day and a half."""
    days, dash, rest = text.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    else:
        hours, minutes, seconds = ([0, *numbers, 0] if len(numbers) < 3 else numbers)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _check_options(key: str, options: Sequence[str]) -> None:
    for option in options:
        if not re.fullmatch(r"--[\w-]+(=.+)?", option):
            raise ConfigError(f"slurm.{key}: {option!r}", fix='write each option by its long name, as one text: "--comment=my project"')
        name = option.partition("=")[0]
        if name in _OWN_OPTIONS:
            raise ConfigError(
                f"slurm.{key}: {option!r}", fix=f"`hpcinfer submit` writes {name} itself: there is a key or a flag for it"
            )
