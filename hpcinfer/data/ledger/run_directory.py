"""The run directory: where a run keeps all that it knows. `run.json` says what the run is; it is never rewritten.

    run.json  writers/<id>.json  writers/<id>.beat  claims/<n>.<generation>  segments/seg-<writer>-<seq>.h5  logs/
    generations.h5  done.json                                   (at the end)
    trial.h5  trial.json                                        (at the end of a trial)
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import json
import os
import time
import uuid as uuid_module
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hpcinfer.data.ledger.commit import create_exclusive, is_transient, replace_bytes
from hpcinfer.errors import ResumableError, RunDirectoryError

FORMAT = "hpcinfer-run"
VERSION = 1
_FOLDERS = ("writers", "claims", "segments", "logs")
_CLAIMS_TARGET = 20_000
_CLAIMS_PER_REPLICA = 32
_OF_A_ROUND = {"truncate"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunIdentity:
    """What makes two jobs the same run. Values are what JSON can hold."""

    input_fingerprint: str
    """Fingerprint of the first `num_rows` rows of the input."""
    num_rows: int
    """Rows of the input as it is now."""
    num_samples: int = 1
    """Output rows for each prompt (`sampling.n`)."""
    model: Mapping[str, Any]
    """Fields that change the answers: fingerprint of config and weights, dtype ..."""
    sampling: Mapping[str, Any]
    """Fields of SamplingParams, prompt template and the like."""
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Paths, versions, host: kept for people, never compared."""


def claim_size_for(num_rows: int, num_replicas: int) -> int:
    """Rows a claim. About 20,000 claims, of 64 to 65,536 rows; a small input is cut finer, so that each of
    `num_replicas` replicas finds about 32 of them and all end at about the same time.
    """
    size = min(65_536, max(64, -(-num_rows // _CLAIMS_TARGET)))
    return max(1, min(size, num_rows // (_CLAIMS_PER_REPLICA * max(1, num_replicas))))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunDirectory:
    """An open run directory: the facts of run.json, and where things are."""

    path: Path
    uuid: str
    num_rows: int
    """Rows of the input when the run was created; more may have been appended since."""
    num_samples: int
    claim_size: int
    """Rows a claim."""
    created: str
    """UTC time, ISO 8601, of the clock of the node that created it."""
    identity: RunIdentity

    @property
    def writers(self) -> Path:
        return self.path / "writers"

    @property
    def claims(self) -> Path:
        return self.path / "claims"

    @property
    def segments(self) -> Path:
        return self.path / "segments"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def generations(self) -> Path:
        """The merged output, there at the end of a run."""
        return self.path / "generations.h5"

    @property
    def trial(self) -> Path:
        """The rows that are there at the end of a trial, in the form of `generations`."""
        return self.path / "trial.h5"

    def write_trial(self, facts: Mapping[str, Any]) -> None:
        """Writes trial.json, the marker of a trial that has all of its rows. Raises RunDirectoryError, ResumableError."""
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with storage_errors(self.path):
            replace_bytes(self.path, "trial.json", _to_json({"ended": when, **facts}), durable=True)

    @property
    def done(self) -> Path:
        """The marker of completion."""
        return self.path / "done.json"

    def read_done(self) -> dict[str, Any] | None:
        """The marker of completion: {"num_rows", "num_samples", "ok", "failed", ...}, or None. Raises
        RunDirectoryError, ResumableError.
        """
        with storage_errors(self.path):
            return read_json(self.done)

    def is_complete(self, num_rows: int, retry_round: int = 0) -> bool:
        """Whether generations.h5 holds every (row, sample) of an input of `num_rows` rows, failed ones tried again in
        `retry_round` rounds (`rounds`).
        """
        done = self.read_done()
        return done is not None and self.is_completed_by(done, num_rows, retry_round)

    def is_completed_by(self, done: Mapping[str, Any], num_rows: int, retry_round: int = 0) -> bool:
        """`is_complete` by what the marker says."""
        if done.get("num_rows", -1) < num_rows or done.get("retry_round", 0) < retry_round:
            return False
        return self.generations.exists()

    def write_done(self, facts: Mapping[str, Any], owner: str) -> None:
        """Writes the marker, after generations.h5 has its name; `owner` is the writer's id. Raises OSError."""
        replace_bytes(self.path, "done.json", _to_json(facts), durable=True, owner=owner)


def create_or_open(
    path: str | Path,
    identity: RunIdentity,
    *,
    num_replicas: int = 1,
    prefix_fingerprint: Callable[[int], str] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> RunDirectory:
    """The run directory for this job: created, or opened when it belongs to the same run. Any number of processes may
    call it at once; they agree on one run.json. The folder and, if need be, its parent are created; a longer missing
    path is an error.

    An input that has grown is accepted when `prefix_fingerprint(n)`, the fingerprint of its first n rows, is the one
    stored; without that function only an unchanged input is.

    Raises RunDirectoryError (not a folder, read-only, no permission, another model, input or sampling: which fields
    differ, with both values); ResumableError where the disk is full.
    """
    path = Path(path)
    with storage_errors(path):
        _make_folder(path)
        if not (path / "run.json").exists():
            _refuse_leftovers(path)
            for name in _FOLDERS:
                (path / name).mkdir(exist_ok=True)
            # When another process was faster, its run.json counts.
            with contextlib.suppress(FileExistsError):
                create_exclusive(path, "run.json", _to_json(_new_run(identity, num_replicas)))
    run = open_existing(path, sleep=sleep)
    _check_same_run(run, identity, prefix_fingerprint)
    return run


def open_existing(path: str | Path, *, sleep: Callable[[float], None] = time.sleep) -> RunDirectory:
    """The run directory at `path`, whatever run it is. Raises RunDirectoryError where it is none."""
    path = Path(path)
    facts = None
    with storage_errors(path):
        # Where links do not exist run.json is empty for a moment after its creation.
        for _ in range(50):
            facts = read_json(path / "run.json")
            if facts is not None or not (path / "run.json").exists():
                break
            sleep(0.1)
    if facts is None:
        raise RunDirectoryError(
            f"{path} is not a run directory",
            found="run.json is empty or damaged" if (path / "run.json").exists() else _what_is(path),
            fix="give the folder named by data.output of the job; remove it if it is the rest of a failed start",
        )
    if facts.get("format") != FORMAT or facts.get("version") != VERSION:
        raise RunDirectoryError(
            f"{path} was written by another version of hpcinfer",
            found=f"format {facts.get('format')!r}, version {facts.get('version')!r}; this one reads {VERSION}",
            fix="finish the run with the version that began it, or give another data.output",
        )
    try:
        identity = RunIdentity(**facts["identity"])
        return RunDirectory(
            path=path,
            uuid=facts["uuid"],
            num_rows=identity.num_rows,
            num_samples=identity.num_samples,
            claim_size=facts["claim_size"],
            created=facts["created"],
            identity=identity,
        )
    except (KeyError, TypeError) as error:
        raise RunDirectoryError(
            f"{path / 'run.json'} is incomplete", found=f"{type(error).__name__}: {error}"
        ) from error


def unusable(path: Path, error: OSError) -> RunDirectoryError | ResumableError:
    """The error to raise when the file system refuses something in the run directory."""
    reason = f"{error.strerror or error} ({error.filename or path})"
    if isinstance(error, (NotADirectoryError, FileExistsError)):
        return RunDirectoryError(f"the run directory {path} cannot be used", found=reason, fix="a file is in its place")
    if isinstance(error, PermissionError):
        return RunDirectoryError(f"no permission to use the run directory {path}", found=reason, fix="check its owner")
    if isinstance(error, FileNotFoundError):
        return RunDirectoryError(f"the run directory {path} is not there", found=reason, fix=_what_is(path))
    if error.errno == errno.EROFS:
        return RunDirectoryError(
            f"the run directory {path} is on a read-only file system",
            found=reason,
            fix="give a data.output that can be written",
        )
    if is_transient(error):
        fix = "free space, start again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "start again; see dmesg and the file system"
        return ResumableError(f"the run directory {path} cannot be used now", found=reason, fix=fix)
    return RunDirectoryError(f"the run directory {path} cannot be used", found=reason)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns an OSError inside it into `unusable`."""
    try:
        yield
    except OSError as error:
        raise unusable(path, error) from error


def _make_folder(path: Path) -> None:
    if path.is_dir():
        return
    parent = path.absolute().parent
    if not parent.exists() and not parent.parent.is_dir():
        nearest = next(p for p in parent.parents if p.exists())
        raise RunDirectoryError(
            f"the run directory {path} cannot be created: its parent folders are missing",
            found=f"{nearest} is the nearest that exists",
            fix=f"mkdir -p {parent}, or correct data.output",
        )
    path.mkdir(parents=True, exist_ok=True)


def _refuse_leftovers(path: Path) -> None:
    # Other files of the user (logs of Slurm ...) do no harm; output whose run.json is gone could be taken for this
    # run's.
    leftovers = [name for name in ("generations.h5", "done.json") if (path / name).exists()]
    leftovers += [f"{name}/*" for name in ("claims", "segments") if (path / name).is_dir() and os.listdir(path / name)]
    if leftovers and not (path / "run.json").exists():
        raise RunDirectoryError(
            f"{path} holds the output of a run whose run.json is missing",
            found=", ".join(leftovers),
            fix="give another data.output, or move these files away",
        )


def _what_is(path: Path) -> str:
    if path.is_dir():
        return "a folder without run.json"
    return "a file" if path.exists() else "nothing is there"


def _new_run(identity: RunIdentity, num_replicas: int) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "uuid": str(uuid_module.uuid4()),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "claim_size": claim_size_for(identity.num_rows, num_replicas),
        "identity": {field.name: getattr(identity, field.name) for field in dataclasses.fields(identity)},
    }


def _check_same_run(run: RunDirectory, wanted: RunIdentity, prefix_fingerprint: Callable[[int], str] | None) -> None:
    stored = run.identity
    differences = []
    for section in ("model", "sampling"):  # what a later round may change is checked there (`rounds`)
        before, now = dict(getattr(stored, section)), json.loads(_to_json(getattr(wanted, section)))
        for key in sorted((before.keys() | now.keys()) - _OF_A_ROUND):
            if before.get(key) != now.get(key):
                differences.append(f"{section}.{key}: the run has {before.get(key)!r}, this job {now.get(key)!r}")
    if stored.num_samples != wanted.num_samples:
        differences.append(f"sampling.n: the run has {stored.num_samples}, this job {wanted.num_samples}")
    if wanted.num_rows < stored.num_rows:
        differences.append(f"input rows: the run has {stored.num_rows}, this job {wanted.num_rows}")
    else:
        fingerprint = wanted.input_fingerprint
        if wanted.num_rows > stored.num_rows and prefix_fingerprint is not None:
            fingerprint = prefix_fingerprint(stored.num_rows)
        if fingerprint != stored.input_fingerprint:
            differences.append(
                f"input fingerprint of the first {stored.num_rows} rows: the run has {stored.input_fingerprint}, "
                f"this job {fingerprint}"
            )
    if differences:
        raise RunDirectoryError(
            f"{run.path} belongs to another run",
            found="; ".join(differences),
            fix="give another data.output, or put the job back as it was",
        )


def _to_json(facts: Mapping[str, Any]) -> bytes:
    return (json.dumps(facts, indent=1, default=_plain) + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)


def read_json(path: Path) -> dict[str, Any] | None:
    """None where there is no such file, or not (yet) a whole JSON object in it. Raises OSError."""
    try:
        facts = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None
