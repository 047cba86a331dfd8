"""What is found out before anything is loaded. Rank 0 alone reads; the others are told (`parallel.agree.agree_or_raise`)."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch

import hpcinfer
from hpcinfer.config.job import JobConfig
from hpcinfer.config.model import ModelConfig
from hpcinfer.config.parallel import check_layout
from hpcinfer.data.prompts.identity import prefix_fingerprint
from hpcinfer.data.prompts.reader import PromptsReader, open_prompts
from hpcinfer.data.ledger.budgets import read_budget
from hpcinfer.data.ledger.lives import check_lives
from hpcinfer.data.ledger.rounds import check_truncation, choose_round
from hpcinfer.data.ledger.run_directory import RunIdentity, create_or_open
from hpcinfer.data.ledger.selection import select_rows
from hpcinfer.data.tokenize import Tokenizer
from hpcinfer.engine.replica_plan import ReplicaPlan
from hpcinfer.engine.memory import context_limit
from hpcinfer.engine.requests import RequestBuilder
from hpcinfer.errors import ConfigError, RowError
from hpcinfer.layers.experts import check_packed
from hpcinfer.launch.env import LaunchEnvironment
from hpcinfer.launch.walltime import job_end_s
from hpcinfer.models.checkpoint import Checkpoint, check_tensors
from hpcinfer.models.registry import model_class
from hpcinfer.parallel.mesh import Mesh
from hpcinfer.runner.identity import model_facts, sampling_facts
from hpcinfer.runner.prompt_limit import PromptLimit


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CheckedJob:
    """A job of which all that can be known without loading is known to fit."""

    mesh: Mesh
    """As rank 0 sees it."""
    model: ModelConfig
    checkpoint: Checkpoint
    """What the headers of the weights say: rank 0 alone has read them."""
    num_rows: int
    """Rows of the prompts now."""
    started: str
    """When and as which Slurm job this start began; names its logs."""
    ends_s: float | None
    """When the job ends, in seconds since the epoch; None if nobody says."""


def check_job(job: JobConfig, world_size: int, environment: LaunchEnvironment) -> CheckedJob:
    """Check layout, model folder and prompts against each other. Raises HpcinferError on any misfit."""
    parallel = job.parallel
    model = dataclasses.replace(
        ModelConfig.from_folder(job.model.path), packed_experts=job.model.experts == "packed"
    )
    check_layout(model, parallel)
    if model.packed_experts:
        check_packed(model, parallel.tp if parallel.ep == 1 else 1)
    mesh = Mesh.of(
        world_size, pp=parallel.pp, sp=parallel.sp, tp=parallel.tp, ep=parallel.ep, dp=parallel.dp or None
    )
    prompt_limit(job, context_limit(model, job.engine))
    checkpoint = Checkpoint(job.model.path)
    check_tensors(checkpoint, model_class(model), model)
    _check_sampling(job, model)
    with open_job_prompts(job) as reader:
        if reader.kind == "text":
            Tokenizer(job.model.path)
        select_rows(job.data.rows, job.data.limit, reader.num_rows)
        started = time.strftime("%Y%m%dT%H%M%S") + (f"-job{environment.job_id}" if environment.job_id else "")
        return CheckedJob(
            mesh=mesh, model=model, checkpoint=checkpoint, num_rows=reader.num_rows, started=started,
            ends_s=job_end_s(environment),
        )


def _check_sampling(job: JobConfig, model: ModelConfig) -> None:
    """Raise ConfigError where the job's own sampling would fail every row."""
    sampling = job.sampling
    tokenizer = job_tokenizer(job) if sampling.stop or sampling.bad_words or sampling.is_structured else None
    try:
        RequestBuilder(tokenizer, model.vocab_size).check(sampling)
    except RowError as error:
        raise ConfigError(f"[sampling] cannot be done with {job.model.path}: {error}", fix="correct the job's [sampling]") from error


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OpenedRun:
    """What a start finds in its run directory."""

    complete: bool
    retry_round: int
    """Of this start: how often failed rows were given another try (`data.ledger.rounds`)."""
    kv_tokens_limit: int | None
    """K/V tokens that a start in this layout may have, where one ran out of memory with more."""


def open_run(job: JobConfig, checked: CheckedJob, plan: ReplicaPlan, environment: LaunchEnvironment) -> OpenedRun:
    """Create the run directory, or make sure that the one that is there belongs to this job, and that it makes sense to go on."""
    with open_job_prompts(job) as reader:
        identity = RunIdentity(
            input_fingerprint=prefix_fingerprint(reader, checked.num_rows),
            num_rows=checked.num_rows,
            num_samples=job.sampling.n,
            model=model_facts(job, plan.dtype),
            sampling=sampling_facts(job, plan.limits.max_context),
            notes={
                "model": job.model.path, "prompts": job.data.prompts, "hpcinfer": hpcinfer.__version__,
                "torch": torch.__version__,
            },
        )
        run = create_or_open(
            job.data.output, identity, num_replicas=checked.mesh.dp,
            prefix_fingerprint=lambda num_rows: prefix_fingerprint(reader, num_rows),
        )
    slurm_job = {
        "job": str(environment.job_id or ""), "cluster": environment.cluster, "restart_count": environment.restart_count,
    }
    retry_round = choose_round(
        run, checked.num_rows, retry=job.run.retry_failed, array=str(environment.array_id or ""), **slurm_job
    )
    complete = run.is_complete(checked.num_rows, retry_round)
    if not (complete and job.run.retry_failed):  # a retry of a run without failed rows has nothing to do, whatever it would cut
        check_truncation(run, retry_round, identity.sampling)
    check_lives(run, checked.num_rows, max_lives=job.run.max_lives, retry_round=retry_round, **slurm_job)
    return OpenedRun(
        complete=complete,
        retry_round=retry_round,
        kv_tokens_limit=read_budget(run, layout=job.parallel.replica_layout),
    )


def open_job_prompts(job: JobConfig) -> PromptsReader:
    """The prompts of a job, with the continuations that it scores."""
    reader = open_prompts(job.data.prompts, job.data.dataset or None)
    if job.task.continuation:
        try:
            reader.read_continuations(job.task.continuation)
        except BaseException:
            reader.close()
            raise
    return reader


def job_tokenizer(job: JobConfig) -> Tokenizer | None:
    """The tokenizer of a job's model; None where it has none, and prompts are token ids."""
    return Tokenizer(job.model.path) if (Path(job.model.path) / "tokenizer.json").is_file() else None


def prompt_limit(job: JobConfig, max_context: int) -> PromptLimit:
    """What a job does with too long prompts. Raises ConfigError where its limit is above the context's."""
    max_context += not job.task.generates  # no room is needed for an output token
    if job.data.max_prompt_tokens >= max_context:
        raise ConfigError(
            f"data.max_prompt_tokens = {job.data.max_prompt_tokens} is too much for the context",
            found=f"at most {max_context - 1} fit", fix=f"give at most {max_context - 1}",
        )
    return PromptLimit(max_context, job.data.max_prompt_tokens, job.data.truncate)
