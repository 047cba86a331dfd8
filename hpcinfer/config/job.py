"""A job: what to run, section by section. `jobs/*.toml` are written in these names; every key has its default here."""

from __future__ import annotations

import dataclasses
import math
import os
import re

from hpcinfer.config.parallel import ParallelConfig
from hpcinfer.errors import ConfigError
from hpcinfer.request import SamplingParams, TaskParams
from hpcinfer.units import parse_bytes

EXPERT_FORMS = ("unpacked", "packed")
DEVICES = ("auto", "cpu", "cuda")
SWITCH = ("auto", "on", "off")
MODEL_DTYPES = ("float32", "bfloat16", "float16", "auto")
TRUNCATIONS = ("error", "left", "right")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """The `[model]` section."""

    path: str
    """A Hugging Face folder: config.json, safetensors, tokenizer.json. Relative paths start at the working directory."""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto: what the checkpoint was saved in. Default auto."""
    experts: str = "unpacked"
    """Experts of MXFP4 checkpoints in memory: unpacked (to dtype, at the start) or packed (4.25 bits a number, an expert is unpacked
    whenever tokens are sent to it: slower, for models that would not fit). Default unpacked."""

    def __post_init__(self) -> None:
        if self.dtype not in MODEL_DTYPES:
            raise ConfigError(f"model.dtype = {self.dtype!r}", fix=f"give one of {', '.join(MODEL_DTYPES)}")
        if self.experts not in EXPERT_FORMS:
            raise ConfigError(f"model.experts = {self.experts!r}", fix=f"give one of {', '.join(EXPERT_FORMS)}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataSection:
    """The `[data]` section."""

    prompts: str
    """An HDF5 file of prompts; a folder or a glob of shards is read as one."""
    output: str
    """The run directory. generations.h5 appears in it; running again with the same one resumes."""
    dataset: str = ""
    """Name of the dataset with the prompts, for foreign HDF5 layouts. Default "": found by itself."""
    limit: int = 0
    """Above 0: this start is a trial, of so many rows, drawn from the whole input (or from `rows`) by a fixed key: the same ones each
    time, and a larger limit has those of a smaller one. A trial works in <output>-trial, unless --set data.output names a folder; it
    ends with what the whole run would take. The run directory is one like any other: a start without limit goes on from it. Default 0."""
    rows: str = ""
    """"a:b": this start is a trial of rows a to b - 1 alone, counted from 0; either end may be left out. Default "": all."""
    truncate: str = "error"
    """What becomes of prompts of too many tokens: error (a failed row), left (the first tokens are cut off, the last ones kept) or right
    (the last ones are cut off). Part of what a run is; from error it may be changed together with --retry-failed. Default error."""
    max_prompt_tokens: int = 0
    """Prompts of more tokens are too long, and are cut to so many. Default 0: those are too long that leave no room for an output token,
    and they are cut so that the row's max_tokens fit."""

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ConfigError(f"data.limit = {self.limit}", fix="give a number of rows, or 0 for all")
        if not re.fullmatch(r"(\d*:\d*)?", self.rows):
            raise ConfigError(f"data.rows = {self.rows!r}", fix='give "a:b" for rows a to b - 1; either number may be left out')
        if self.truncate not in TRUNCATIONS:
            raise ConfigError(f"data.truncate = {self.truncate!r}", fix=f"give one of {', '.join(TRUNCATIONS)}")
        if self.max_prompt_tokens < 0:
            raise ConfigError(f"data.max_prompt_tokens = {self.max_prompt_tokens}", fix="give 0 (what the context allows) or more")
        for name in ("prompts", "output"):
            if not getattr(self, name):
                raise ConfigError(f"data.{name} is empty", fix="give a path")
        if os.path.abspath(self.output) == os.path.abspath(self.prompts):
            raise ConfigError(
                "data.output is the folder of the prompts", found=self.output, fix="give the run directory a path of its own"
            )

    @property
    def is_trial(self) -> bool:
        """Whether this start takes some of the rows only."""
        return self.limit > 0 or bool(self.rows)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineSection:
    """The `[engine]` section: device, batching and memory of one replica."""

    device: str = "auto"
    """Where ranks compute: cuda (each rank a GPU of its own, by its number on the node), cpu, or auto: GPUs where all ranks have
    one. Default auto."""
    attention: str = "auto"
    """Attention backend by name (`hpcinfer attention` lists them), or auto. Default auto."""
    block_size: int = 0
    """Tokens in a page of the K/V cache. Default 0: what the attention backend prefers, 16 on CPU."""
    kv_memory: str = "auto"
    """Memory for keys and values on each rank, such as "4 GiB"; auto takes a share of what is free. Default auto."""
    kv_memory_share: float = 0.0
    """With kv_memory = auto: the share of a rank's memory that is free after weights and working space. Default 0: 0.5 on CPUs, 0.93
    on GPUs."""
    max_batch_tokens: int = 2048
    """Most tokens that a lane computes in one step; longer prompts are prefilled in chunks. Default 2048."""
    max_sequences: int = 256
    """Most sequences in work at once in a replica. Default 256."""
    max_context: int = 0
    """Longest prompt plus output in tokens; rows above it fail. Default 0: what the model allows."""
    graphs: str = "auto"
    """Decode steps are captured in CUDA graphs at the start, for a few dozen sizes up to max_sequences, and replayed: on (an error
    where that is not possible), off, or auto: on GPUs with an attention backend that allows it. Default auto."""
    run_ahead: str = "auto"
    """Queue a step before the tokens of the one before it are known on the host: a GPU then never waits for scheduling. Costs a
    token too many for each row. on, off, or auto: on GPUs with one stage and one step in flight. Default auto."""

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ConfigError(f"engine.device = {self.device!r}", fix=f"give one of {', '.join(DEVICES)}")
        for name in ("graphs", "run_ahead"):
            if getattr(self, name) not in SWITCH:
                raise ConfigError(f"engine.{name} = {getattr(self, name)!r}", fix=f"give one of {', '.join(SWITCH)}")
        for name in ("max_batch_tokens", "max_sequences"):
            if getattr(self, name) < 1:
                raise ConfigError(f"engine.{name} = {getattr(self, name)}", fix="give 1 or more")
        if self.block_size < 0:
            raise ConfigError(f"engine.block_size = {self.block_size}", fix="give 0 (what the attention backend prefers) or more")
        if self.max_context < 0:
            raise ConfigError(f"engine.max_context = {self.max_context}", fix="give 0 (what the model allows) or more")
        if not 0 <= self.kv_memory_share <= 0.98:
            raise ConfigError(f"engine.kv_memory_share = {self.kv_memory_share}", fix="give 0 (the default) or a share up to 0.98")
        if self.kv_memory != "auto":
            parse_bytes(self.kv_memory)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CommSection:
    """The `[comm]` section."""

    deadline_s: float = 600.0
    """A transfer that takes longer ends the run with a report of who waited for whom, and so does a replica's leader that says
    nothing for longer than this and run.retry_s. Seconds, default 600."""
    strict: bool = False
    """One transfer at a time on each communicator, synchronous sends: slower, shows ordering mistakes. For tests."""
    heartbeat_s: float = 10.0
    """Each rank sends another one a sign of life so often, at least four times within deadline_s; one that is silent for twice
    deadline_s ends the run with a report. Seconds, 0 switches it off. Default 10."""
    share_gpu: bool = False
    """Several ranks may have one GPU: slow, for tests on a machine with a single one. Default false."""

    def __post_init__(self) -> None:
        if not self.deadline_s > 0:
            raise ConfigError(f"comm.deadline_s = {self.deadline_s}", fix="give seconds above 0")
        if not 0 <= self.heartbeat_s < math.inf:
            raise ConfigError(f"comm.heartbeat_s = {self.heartbeat_s}", fix="give 0 (no heartbeats) or more")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunSection:
    """The `[run]` section: the ledger, and when to give up."""

    segment_rows: int = 4096
    """Finished rows are committed to disk at the latest after this many. Default 4096."""
    segment_s: float = 30.0
    """Finished rows are committed to disk at the latest after this time. Seconds, default 30."""
    heartbeat_s: float = 5.0
    """Time between two heartbeats of a writer. Seconds, default 5."""
    stale_s: float = 120.0
    """A writer on another host whose heartbeat has stood still for this long may lose its claims. Seconds, default 120."""
    retry_s: float = 300.0
    """How long finished rows wait in memory for a disk that is full or fails, before the run stops. Seconds, default 300."""
    linger_s: float = 600.0
    """How long a replica without work waits for others that may die. Seconds, default 600."""
    drain_s: str = "auto"
    """How long rows in work may go on after SIGUSR1 or SIGTERM; none are begun any more, and what is not finished then is kept as
    partial rows. A second signal ends the waiting. Seconds, or auto: after SIGUSR1 as long as the job lasts, without margin_s; 5
    after SIGTERM, and where the job's end is not known. Give it where signals come so long before the end that auto would wait
    too short or, with preemption, too long. Default auto."""
    margin_s: float = 30.0
    """Kept free before the job's end for committing and leaving. Should no signal come, the drain begins by itself drain_s before
    that (auto: margin_s). Neither takes more than an eighth of the job's time. Raise it where the storage is slow. Seconds, default
    30."""
    max_lives: int = 100
    """How often Slurm may start one job: a life above this count ends with an error, and so does one after two lives of the job in
    which nothing was committed. Default 100."""
    max_failed: str = "100%"
    """Failed rows that turn the run into exit code 1: a count ("20") or a share ("1%"). Default "100%": never."""
    retry_failed: bool = False
    """Compute failed rows again: the answer of one that is ok now replaces the failed row, in generations.h5 too. A start that finds such
    a retry unfinished joins it, and so do tasks of one job array and later lives of a job; else each start with it is a new try.
    To be given on the command line (--retry-failed). Default false."""
    trace: bool = False
    """Record what every rank does and when; `hpcinfer trace` shows it. Default false."""

    def __post_init__(self) -> None:
        for name in ("segment_rows", "segment_s", "heartbeat_s", "stale_s", "retry_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"run.{name} = {getattr(self, name)}", fix="give a number above 0")
        for name in ("linger_s", "margin_s"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"run.{name} = {getattr(self, name)}", fix="give 0 or more")
        if not re.fullmatch(r"auto|\d+(\.\d+)?", self.drain_s):
            raise ConfigError(f"run.drain_s = {self.drain_s!r}", fix='give seconds, or "auto"')
        if self.max_lives < 1:
            raise ConfigError(f"run.max_lives = {self.max_lives}", fix="give 1 or more")
        if not re.fullmatch(r"\d+|\d+(\.\d+)?%", self.max_failed):
            raise ConfigError(f"run.max_failed = {self.max_failed!r}", fix='give a count such as "20" or a share such as "1%"')

    @property
    def drain_limit_s(self) -> float | None:
        """`drain_s` in seconds; None for auto."""
        return None if self.drain_s == "auto" else float(self.drain_s)

    def allowed_failures(self, num_rows: int) -> int:
        """The number of failed output rows that is still accepted, of `num_rows`."""
        if self.max_failed.endswith("%"):
            return int(float(self.max_failed[:-1]) / 100 * num_rows)
        return int(self.max_failed)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JobConfig:
    """A whole job file."""

    model: ModelSection
    data: DataSection
    sampling: SamplingParams = SamplingParams()
    parallel: ParallelConfig = ParallelConfig()
    engine: EngineSection = EngineSection()
    comm: CommSection = CommSection()
    run: RunSection = RunSection()
    task: TaskParams = TaskParams()

    def __post_init__(self) -> None:
        if self.sampling.n != 1 and not self.task.generates:
            raise ConfigError(
                f"sampling.n = {self.sampling.n} with task.kind = {self.task.kind!r}", fix="leave sampling.n at 1: nothing is drawn"
            )
