"""The sbatch script of a start, as text: job facts from the job file, cluster facts from the site. Pure: data in, text out.

Everything that varies is quoted for the one who reads it: words of bash by `shlex.quote`, values of #SBATCH lines by Slurm's own rules
(`directive`), and comments carry no line breaks. `launch.lives` has the constant parts: how a job ends and goes on.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator, Sequence

from hpcinfer.config.checks import has_control_characters
from hpcinfer.config.site import Site
from hpcinfer.errors import ConfigError
from hpcinfer.launch import lives
from hpcinfer.launch.shape import Shape
from hpcinfer.launch.site import SITE_VARIABLE

_FIXED_VARIABLES = {
    "PYTHONNOUSERSITE": "1",  # packages of ~/.local would shadow those of the environment
    "HF_HUB_OFFLINE": "1",  # nodes often have no way out, and would wait for one
    "HDF5_USE_FILE_LOCKING": "FALSE",  # fails on some parallel file systems
    "OMP_WAIT_POLICY": "passive",  # spinning threads would take the cores of other ranks
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BatchJob:
    """What a script is made of."""

    name: str
    """Slurm's job name; letters, digits, dots, dashes and underscores."""
    job_file: str
    """As given, relative to the folder that the job is submitted from."""
    overrides: tuple[str, ...] = ()
    """`--set` values for the ranks."""
    output: str
    """The run directory."""
    is_trial: bool = False
    """Some rows of the run are all that is wanted."""
    site: Site
    site_name: str = ""
    """What ranks find the site by: name or path; "" for none."""
    shape: Shape
    time: str
    """Time limit in one of Slurm's forms."""
    python: str
    """The interpreter where the site names none."""
    command: Sequence[str] = ()
    """The command line that the script comes from, for its header."""


def render(job: BatchJob) -> str:
    """The script. Raises ConfigError for what Slurm cannot carry."""
    parts = (
        _header(job),
        _directives(job),
        [
            f"run={quote(as_argument(job.output))}", f"markers=(done.json{' trial.json' if job.is_trial else ''})",
            f"max_lives={job.site.slurm.max_lives}",
        ],
        _lines(lives.BEGIN + (lives.REQUEUE if job.site.slurm.requeue else lives.SUCCESSOR)),
        _environment(job),
        _scratch(job),
        _lines(lives.BEFORE),
        _ranks(job),
        _lines(lives.AFTER),
    )
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def directive(option: str) -> str:
    """A line `#SBATCH --name=value`. Slurm takes double quotes around a value, with backslashes inside, and no line breaks."""
    if has_control_characters(option):
        raise ConfigError(f"#SBATCH {option!r} holds a line break or control character", fix="Slurm cannot carry it: choose another name")
    name, equals, value = option.partition("=")
    if re.fullmatch(r"[\w@%+=:,./-]*", value, re.ASCII):
        return f"#SBATCH {option}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH {name}{equals}"{escaped}"'


def quote(text: str) -> str:
    """A word of bash that is exactly `text`."""
    return shlex.quote(text)


def quote_with_variables(text: str) -> str:
    """A word of bash that is `text` with $NAME and ${NAME} replaced by the job's variables, and nothing else."""
    pieces = re.split(r"(\$\w+|\$\{\w+\})", text)
    if len(pieces) == 1:
        return quote(text)
    escaped = [piece if index % 2 else re.sub(r'(["\\$`])', r"\\\1", piece) for index, piece in enumerate(pieces)]
    return f'"{"".join(escaped)}"'


def comment(text: str) -> str:
    """A comment of one line, whatever is in `text`."""
    return "# " + "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def describe(job: BatchJob) -> str:
    """A start in words: "jobs/demo.toml on 2 nodes with 4 ranks"."""
    shape = job.shape
    parts = f"an array of {shape.tasks} tasks, each on " if job.site.slurm.requeue else f"{shape.tasks} jobs, each on "
    steps = f" in {shape.steps} steps" if shape.steps > 1 else ""
    nodes = f"{_count(shape.nodes, 'node')} with {_count(shape.ranks, 'rank')}{steps}"
    return f"{job.job_file} on {nodes}" if shape.tasks == 1 else f"{job.job_file} as {parts}{nodes}"


def _header(job: BatchJob) -> Iterator[str]:
    yield "#!/bin/bash"
    yield comment(f"{describe(job)}.")
    if job.command:
        yield comment(f"Rendered by: {shlex.join(job.command)}")
    if job.shape.tasks > 1:
        yield "# They share the run directory and nothing else: each takes rows that no other has; any may fail, end or come later."
    if job.shape.steps > 1:
        yield "# Every replica is a step of its own: a process that fails ends its replica alone. But the steps share the job's fate: when"
        yield "# its first node is lost, all of them end. Where that matters, use an array."


def _directives(job: BatchJob) -> Iterator[str]:
    slurm, shape = job.site.slurm, job.shape
    is_array = shape.tasks > 1 and slurm.requeue
    yield directive(f"--job-name={job.name}")
    if is_array:
        yield directive(f"--array=1-{shape.tasks}")
    yield directive(f"--nodes={shape.nodes}")
    # Of all nodes as many cores as the fullest needs.
    yield directive(f"--ntasks={shape.nodes * shape.ranks_per_node}")
    yield directive(f"--ntasks-per-node={shape.ranks_per_node}")
    if slurm.cores_per_rank:
        yield directive(f"--cpus-per-task={slurm.cores_per_rank}")
    if shape.gpus_per_node:
        yield directive(f"--gpus-per-node={_gpus(job, shape.gpus_per_node)}")
    yield directive(f"--time={job.time}")
    for name, option in (
        (slurm.partition, "--partition"), (slurm.account, "--account"), (slurm.qos, "--qos"), (slurm.constraint, "--constraint"),
        (slurm.memory, "--mem"),
    ):  # fmt: skip
        if name:
            yield directive(f"{option}={name}")
    for option in slurm.options:
        yield directive(option)
    yield f"# This shell is told {slurm.signal_s} s before the time is over, and tells the ranks: they commit what is being generated."
    yield directive(f"--signal=B:USR1@{slurm.signal_s}")
    yield directive("--requeue" if slurm.requeue else "--no-requeue")
    if slurm.requeue:
        yield "# All lives of a job write one log, in the folder that it was submitted from."
    yield directive("--open-mode=append")
    yield directive("--output=%x-%A_%a.log" if is_array else "--output=%x-%j.log")


def _environment(job: BatchJob) -> Iterator[str]:
    environment = job.site.environment
    yield "# ---- environment"
    yield from environment.setup
    if environment.modules:
        yield "type -t module >/dev/null || source /etc/profile"
        yield f"module load {shlex.join(environment.modules)} || finish 1"
    if environment.venv:
        yield f"source {quote_with_variables(environment.venv + '/bin/activate')} || finish 1"
    for name, value in {**_FIXED_VARIABLES, **environment.variables}.items():
        yield f"[[ -v {name} ]] || export {name}={quote(value)}"
    yield f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{_threads(job)}}}"
    if job.site_name:
        yield "# Ranks read it again: NCCL's settings come from there, unless they are set already."
        yield f"export {SITE_VARIABLE}={quote(job.site_name)}"
    yield "# srun would not pass on variables where the job was submitted with --export=NONE; older Slurms do not tell when a job ends."
    yield "export SLURM_EXPORT_ENV=ALL"
    yield "if [[ ! -v SLURM_JOB_END_TIME && $(squeue --noheader --jobs=$me --format=%e) =~ ^[0-9-]+T[0-9:]+$ ]]; then"
    yield '    export SLURM_JOB_END_TIME=$(date --date="${BASH_REMATCH[0]}" +%s)'
    yield "fi"
    yield 'ulimit -Sn "$(ulimit -Hn)"  # one file for each shard, segment and socket'


def _scratch(job: BatchJob) -> Iterator[str]:
    scratch = job.site.scratch
    folder = quote_with_variables(scratch.folder) if scratch.folder else '"${SLURM_TMPDIR:-${TMPDIR:-/tmp}}"'
    yield "# ---- node-local disk: temporary files and compiled kernels"
    yield "on_every_node() {"
    yield '    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --mpi=none "$@"'
    yield "}"
    yield f"scratch={folder}/hpcinfer-$SLURM_JOB_ID"
    yield 'on_every_node mkdir -p -- "$scratch/tmp" "$scratch/environment" || finish 1'
    yield 'export TMPDIR=$scratch/tmp TRITON_CACHE_DIR=$scratch/triton TORCHINDUCTOR_CACHE_DIR=$scratch/inductor'
    if scratch.environment_tar:
        yield "# One read of one large file a node, instead of tens of thousands of small ones a rank."
        yield f"on_every_node tar -xf {quote_with_variables(scratch.environment_tar)} -C \"$scratch/environment\" || finish 1"


def _ranks(job: BatchJob) -> Iterator[str]:
    shape = job.shape
    overrides = (*job.overrides, *(("parallel.dp=1",) if shape.steps > 1 else ()))
    yield "# ---- ranks"
    yield "rank=("
    if job.site.environment.container:
        yield "    " + " ".join(quote_with_variables(word) for word in job.site.environment.container)
    yield f"    {_python(job)} -m hpcinfer run"
    for override in overrides:
        yield f"    --set {quote(override)}"
    yield f"    {quote(as_argument(job.job_file))}"
    yield ")"
    yield "pids=()"
    if shape.steps > 1:
        yield f"for step in {{1..{shape.steps}}}; do"
        yield f'    {_srun(job)} "${{rank[@]}}" &'
        yield "    pids+=($!)"
        yield "done"
    else:
        yield f'{_srun(job)} "${{rank[@]}}" &'
        yield "pids+=($!)"


def _srun(job: BatchJob) -> str:
    slurm, shape = job.site.slurm, job.shape
    ranks = shape.ranks // shape.steps
    ranks_per_node = min(ranks, shape.ranks_per_node)
    nodes = -(-ranks // ranks_per_node) if shape.steps > 1 else shape.nodes
    # srun takes neither GPUs nor cores from the job by itself.
    options = ["--kill-on-bad-exit=1", f"--mpi={slurm.mpi}", f"--nodes={nodes}", f"--ntasks={ranks}"]
    if nodes * ranks_per_node == ranks:
        options.append(f"--ntasks-per-node={ranks_per_node}")
    else:  # which srun ignores where it does not divide, and spreads the ranks by cores
        options.append(f"--distribution=plane={ranks_per_node}")
    if slurm.cores_per_rank:
        options.append(f"--cpus-per-task={slurm.cores_per_rank}")
    if shape.gpus_per_node:
        options.append(f"--gpus-per-node={_gpus(job, -(-shape.gpus_per_node * ranks_per_node // shape.ranks_per_node))}")
    if shape.steps > 1:
        options += ["--exact", "--mem=0"]
    return shlex.join(["srun", *options, *slurm.srun_options])


def _lines(text: str) -> list[str]:
    return text.rstrip("\n").split("\n")


def _python(job: BatchJob) -> str:
    environment = job.site.environment
    if job.site.scratch.environment_tar:
        return '"$scratch/environment/bin/python3"'
    if environment.python:
        return quote_with_variables(environment.python)
    return "python3" if environment.venv or environment.container or environment.modules else quote(job.python)


def _threads(job: BatchJob) -> str:
    if job.site.slurm.cores_per_rank:
        return str(job.site.slurm.cores_per_rank)
    per_node = job.shape.ranks_per_node
    return f"$((SLURM_CPUS_ON_NODE > {per_node} ? SLURM_CPUS_ON_NODE / {per_node} : 1))"


def _gpus(job: BatchJob, number: int) -> str:
    return f"{job.site.slurm.gpu_type}:{number}" if job.site.slurm.gpu_type else str(number)


def as_argument(path: str) -> str:
    """A path that no command takes for an option."""
    return f"./{path}" if path.startswith("-") else path


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
