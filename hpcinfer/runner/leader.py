"""The leader of a replica: one life of a writer, from its registration to its last word."""

from __future__ import annotations

import collections
import contextlib
import logging
import sys
import time
from collections.abc import Iterator

from hpcinfer.config.job import JobConfig
from hpcinfer.data.ledger.coverage import Coverage
from hpcinfer.data.ledger.claims import Ledger
from hpcinfer.data.ledger.liveness import Liveness
from hpcinfer.data.ledger.merge import IncompleteRunError, claim_merge, merge_run, remove_leftovers
from hpcinfer.data.prompts.prompt_row import PromptsReader
from hpcinfer.data.ledger.rounds import WriterRounds
from hpcinfer.data.ledger.run_directory import RunDirectory, storage_errors
from hpcinfer.data.ledger.selection import select_rows
from hpcinfer.data.ledger.segments import SegmentPolicy, SegmentWriter, segment_limit
from hpcinfer.data.stop_text import StopTexts
from hpcinfer.data.ledger.writers import Leaving, Writer, WriterIdentity, register_writer, writer_ids
from hpcinfer.engine.replica import Replica
from hpcinfer.errors import ResumableError, RunDirectoryError
from hpcinfer.launch.env import LaunchEnvironment
from hpcinfer.launch.signals import DrainFlag
from hpcinfer.observe.metrics import PhaseClock
from hpcinfer.observe.progress import ProgressBar
from hpcinfer.observe.trace import IDLE, Recorder, span
from hpcinfer.runner.drain import DrainPlan
from hpcinfer.runner.feed import RowFeed
from hpcinfer.runner.forecast import Forecast
from hpcinfer.runner.preflight import CheckedJob, job_tokenizer, open_job_prompts, prompt_limit
from hpcinfer.runner.progress import RunProgress, earlier_writers
from hpcinfer.runner.replica_loop import LoopFigures, ReplicaLoop, check_failures

_MERGE_POLL_S = 0.2


@contextlib.contextmanager
def registered(
    job: JobConfig,
    checked: CheckedJob,
    run: RunDirectory,
    environment: LaunchEnvironment,
    recorder: Recorder | None,
    *,
    retry_round: int,
) -> Iterator[Writer]:
    """A writer for this life. It registers before it loads, so that a life that ends while it loads is known to later ones."""
    with span(recorder, "register"):
        writer = register_writer(run, _identity(environment, checked, job.data.truncate, retry_round), interval_s=job.run.heartbeat_s)
        writer.set_state("loading")
    try:
        yield writer
    except BaseException:
        writer.leave(Leaving.FAILED)  # its claims are free at once; what was not committed is run again
        raise


def lead(
    job: JobConfig,
    checked: CheckedJob,
    run: RunDirectory,
    writer: Writer,
    replica: Replica,
    *,
    drain: DrainFlag,
    clock: PhaseClock,
    log: logging.Logger,
    console: bool,
    forecasts: bool,
    recorder: Recorder | None = None,
) -> LoopFigures:
    """Run the replica until its part is done, merge if the run is, and let the other ranks go.

    Args:
        writer: of this life; `registered` makes it.
        log: of this rank.
        console: show a progress bar for the whole run.
        forecasts: say whether the run will be over before the job is.
        recorder: gets what this rank does.
    """
    coverage = Coverage(
        run, checked.num_rows, selection=select_rows(job.data.rows, job.data.limit, checked.num_rows),
        retry_round=writer.identity.retry_round,
    )
    known = earlier_writers(run)
    with span(recorder, "read segments"):
        coverage.refresh()
    check_failures(coverage.num_failed, job.run.allowed_failures(coverage.num_wanted), collections.Counter())
    liveness = Liveness(run, stale_after_s=job.run.stale_s)
    left_s = None if checked.ends_s is None else checked.ends_s - time.time()
    progress = RunProgress(
        ProgressBar(sys.stderr) if console else None,
        Forecast(left_s=left_s) if forecasts and left_s is not None else None,
        log, run, own_id=writer.id, rows_total=coverage.num_wanted,
        rows_done=coverage.num_wanted - coverage.num_missing, known=known,
        tokens="output_tokens" if job.task.generates else "prompt_tokens",
    )
    plan = DrainPlan(drain, drain_s=job.run.drain_limit_s, margin_s=job.run.margin_s, left_s=left_s)
    with span(recorder, "open prompts"):
        prompts = open_job_prompts(job)
    with prompts as reader:
        with span(recorder, "prepare"):
            loop = _loop(job, checked, run, replica, writer, coverage, liveness, reader, plan, clock, progress, recorder)
        figures = loop.run()
    progress.update(figures, force=True)
    progress.close()
    replica.stop()
    with clock.phase("io"), span(recorder, "merge"):
        _merge_when_complete(run, writer, _of_all_rows(run, coverage), liveness, recorder)
    with span(recorder, "leave"):
        writer.leave(Leaving.DONE if coverage.is_full else loop.leaving, **loop.beat())
    return figures


def _loop(
    job: JobConfig,
    checked: CheckedJob,
    run: RunDirectory,
    replica: Replica,
    writer: Writer,
    coverage: Coverage,
    liveness: Liveness,
    reader: PromptsReader,
    drain: DrainPlan,
    clock: PhaseClock,
    progress: RunProgress,
    recorder: Recorder | None,
) -> ReplicaLoop:
    ledger = Ledger(run, writer.id, liveness, coverage, retry_s=job.run.retry_s)
    with storage_errors(run.path):
        num_writers = len(writer_ids(run))
    tokenizer = job_tokenizer(job)
    replica.stop_texts = StopTexts(tokenizer) if tokenizer else None
    feed = RowFeed(
        ledger, reader, tokenizer, job.sampling,
        refuse=replica.scheduler.refuse, vocab_size=checked.model.vocab_size, task=job.task,
        limit=prompt_limit(job, replica.scheduler.limits.max_context), grammars=replica.grammars,
    )
    return ReplicaLoop(
        replica=replica,
        feed=feed,
        ledger=ledger,
        segments=SegmentWriter(run, writer.id, _policy(job, num_writers), on_commit=coverage.add_table),
        writer=writer,
        tokenizer=tokenizer,
        max_sequences=job.engine.max_sequences,
        linger_s=job.run.linger_s,
        deadline_s=job.comm.deadline_s,
        failed_before=coverage.num_failed,
        max_failed=job.run.allowed_failures(coverage.num_wanted),
        drain=drain,
        say=progress.say,
        clock=clock,
        on_tick=progress.update,
        recorder=recorder,
        generates=job.task.generates,
    )


def _merge_when_complete(
    run: RunDirectory, writer: Writer, coverage: Coverage, liveness: Liveness, recorder: Recorder | None
) -> None:
    """Merge, or wait for the writer that does, once every row is committed. Where a later start has begun to try failed rows again,
    that is left to it.
    """
    coverage.refresh()
    if not coverage.is_full:
        return
    writer.set_state("merging")
    rounds = WriterRounds(run)
    while not run.is_complete(coverage.num_rows, coverage.retry_round) and rounds.newest() <= coverage.retry_round:
        if claim_merge(run, writer.id, liveness):
            try:
                merge_run(run, coverage.num_rows, progress=writer.step_finished, owner=writer.id)
            except IncompleteRunError:
                if rounds.newest() <= coverage.retry_round:
                    raise
                return
            with contextlib.suppress(RunDirectoryError, ResumableError):
                remove_leftovers(run, liveness)  # temporary files of writers that were killed
        else:
            writer.step_finished()
            with span(recorder, "other writer merges", IDLE):
                time.sleep(_MERGE_POLL_S)


def _of_all_rows(run: RunDirectory, coverage: Coverage) -> Coverage:
    """The coverage of the whole run: a trial's rows may have been the last ones."""
    if coverage.num_wanted == coverage.num_keys:
        return coverage
    return Coverage(run, coverage.num_rows, retry_round=coverage.retry_round)


def _identity(environment: LaunchEnvironment, checked: CheckedJob, truncate: str, retry_round: int) -> WriterIdentity:
    return WriterIdentity.of_this_process(
        cluster=environment.cluster,
        job=str(environment.job_id or ""),
        step=str(environment.step_id if environment.step_id is not None else ""),
        restart_count=environment.restart_count,
        layout=str(checked.mesh),
        num_rows=checked.num_rows,
        array=str(environment.array_id or ""),
        retry_round=retry_round,
        truncate=truncate,
    )


def _policy(job: JobConfig, num_writers: int) -> SegmentPolicy:
    return SegmentPolicy(
        max_rows=job.run.segment_rows,
        max_age_s=job.run.segment_s,
        retry_s=job.run.retry_s,
        max_segments=segment_limit(num_writers),
    )
