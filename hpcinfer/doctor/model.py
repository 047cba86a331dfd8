"""The files that a job reads: checkpoint, tokenizer and prompts, whole and readable on every node, nothing to download."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

from hpcinfer.config.job import JobConfig
from hpcinfer.config.model import ModelConfig
from hpcinfer.data.prompts.reader import open_prompts
from hpcinfer.data.tokenize import Tokenizer
from hpcinfer.doctor.file_probe import read_rate
from hpcinfer.doctor.finding import Finding, RankPlace, absent, by_value, green, host_names, red, red_error, who, yellow
from hpcinfer.errors import CheckpointError, DataError, HpcinferError, ResumableError
from hpcinfer.models.checkpoint import Checkpoint, check_tensors
from hpcinfer.models.registry import model_class
from hpcinfer.units import counted, format_bytes, format_duration

SLOW_LOADING_S = 900.0
_READ_BYTES = 32 * 2**20
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What one process, rank 0, found in the files of a job."""

    path: str
    """Of the model folder."""
    model: ModelConfig | None = None
    """None where its config cannot be read."""
    error: HpcinferError | None = None
    """Of config.json or the checkpoint."""
    tokenizer_error: HpcinferError | None = None
    prompts_error: HpcinferError | None = None
    prompts_kind: str = ""
    """text or token_ids."""
    num_rows: int = 0
    """Prompts."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FileFacts:
    """What one node sees of the model folder."""

    place: RankPlace
    sizes: dict[str, int]
    """Name -> bytes of its files; -1 where one cannot be opened."""
    read_bytes_per_s: float = 0.0
    """Of a part of the largest file; 0 where there is nothing to read. The node's cache counts."""

    @property
    def weight_bytes(self) -> int:
        return sum(size for name, size in self.sizes.items() if name.endswith(".safetensors") and size > 0)


def gather_model(job: JobConfig) -> ModelFacts:
    """Read config, headers of the weights, tokenizer and the frame of the prompts. For one rank: many small reads. What cannot
    be read is a fact, whatever the reason."""
    facts = ModelFacts(path=job.model.path)
    try:
        model = ModelConfig.from_folder(job.model.path)
        facts = dataclasses.replace(
            facts, model=dataclasses.replace(model, packed_experts=job.model.experts == "packed")
        )
        check_tensors(Checkpoint(job.model.path), model_class(model), facts.model)
    except (HpcinferError, OSError) as error:
        facts = dataclasses.replace(facts, error=_of_the_folder(error, job.model.path))
    try:
        Tokenizer(job.model.path)
    except (HpcinferError, OSError) as error:
        facts = dataclasses.replace(facts, tokenizer_error=_of_the_folder(error, job.model.path))
    try:
        with open_prompts(job.data.prompts, job.data.dataset or None) as reader:
            return dataclasses.replace(facts, prompts_kind=reader.kind, num_rows=reader.num_rows)
    except (DataError, ResumableError) as error:
        return dataclasses.replace(facts, prompts_error=error)
    except OSError as error:
        refused = DataError(f"cannot read {job.data.prompts}", found=str(error), fix="look at its permissions")
        return dataclasses.replace(facts, prompts_error=refused)


def _of_the_folder(error: HpcinferError | OSError, folder: str) -> HpcinferError:
    """An OSError, which pathlib raises where it may not look, as an error of the model folder."""
    if isinstance(error, HpcinferError):
        return error
    return CheckpointError(f"cannot read {folder}", found=str(error), fix="look at permissions, and at where its links point")


def gather_files(place: RankPlace, folder: Path, num_nodes: int) -> FileFacts:
    """Open every file of a model folder from this node, and read a part of the largest: another part on every node."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)
    except OSError:
        return FileFacts(place=place, sizes={})
    sizes = {path.name: _readable_size(path) for path in paths}
    weights = [path for path in paths if path.suffix == ".safetensors" and sizes[path.name] > 0]
    if not weights:
        return FileFacts(place=place, sizes=sizes)
    largest = max(weights, key=lambda path: sizes[path.name])
    offset = sizes[largest.name] // num_nodes * place.node
    try:
        rate = read_rate(largest, _READ_BYTES, offset=offset, drop=False)
    except OSError:
        sizes[largest.name], rate = -1, 0.0
    return FileFacts(place=place, sizes=sizes, read_bytes_per_s=rate)


def judge_model(facts: ModelFacts, files: Sequence[FileFacts]) -> list[Finding]:
    """A job's files. `files`: of the first rank of each node."""
    return [
        _prompts(facts), _checkpoint(facts, files), _everywhere(files), _tokenizer(facts), _local(facts), _loading(files),
    ]


def _prompts(facts: ModelFacts) -> Finding:
    if facts.prompts_error is not None:
        return red_error("prompts", facts.prompts_error)
    return green("prompts", f"{counted(facts.num_rows, 'row')} of {facts.prompts_kind.replace('_', ' ')}")


def _checkpoint(facts: ModelFacts, files: Sequence[FileFacts]) -> Finding:
    if facts.error is not None:
        return red_error("model files", facts.error)
    shards = sum(name.endswith(".safetensors") for name in files[0].sizes)
    return green("model files", f"{facts.model.family}: all tensors are there, {shards} file{'s' if shards > 1 else ''}, "
                 f"{format_bytes(files[0].weight_bytes)}")


def _everywhere(files: Sequence[FileFacts]) -> Finding:
    """The same files with the same sizes, all readable, on every node."""
    check = "model on all nodes"
    unreadable = {each.place: [name for name, size in each.sizes.items() if size < 0] for each in files}
    if places := [place for place, names in unreadable.items() if names]:
        return red(
            check, f"{host_names(places)} cannot read {', '.join(unreadable[places[0]][:4])}",
            "look at permissions and mounts there, and at links whose target is missing", places,
        )
    versions = by_value((each.place, tuple(sorted(each.sizes.items()))) for each in files)
    if len(versions) > 1:
        most, *others = versions
        places = [place for version in others for place in versions[version]]
        names = sorted(name for name, _ in set(most) ^ set(others[0]))
        return red(
            check, f"{who(places)} see other files than most: {', '.join(dict.fromkeys(names))}",
            "copy the whole folder again to the nodes where it lies on a local disk, or use a shared one", places,
        )
    if len(files) == 1:
        return absent(check, "one node")
    return green(check, f"{len(files)} nodes see the same {len(files[0].sizes)} files")


def _tokenizer(facts: ModelFacts) -> Finding:
    if facts.tokenizer_error is None:
        return green("tokenizer", "tokenizer.json loads")
    if facts.prompts_kind == "token_ids":
        return yellow(
            "tokenizer", f"{facts.tokenizer_error.problem}: prompts are token ids, and generations will carry no text",
            "copy tokenizer.json into the folder if text is wanted",
        )
    error = facts.tokenizer_error
    return red(
        "tokenizer", f"{error.problem}{': ' + error.found if error.found else ''}",
        "copy tokenizer.json of the model into its folder (transformers' AutoTokenizer.from_pretrained(A).save_pretrained(B) "
        "writes it), or give prompts as token ids",
    )


def _local(facts: ModelFacts) -> Finding:
    if not os.path.isdir(facts.path) and _HUB_NAME.fullmatch(facts.path):
        return red(
            "no network", f"{facts.path!r} is no folder, but looks like a name on a hub; a run downloads nothing",
            f"download it where there is internet (hf download {facts.path} --local-dir FOLDER) and set model.path = FOLDER",
        )
    return green("no network", "model, tokenizer and prompts are files; a run downloads nothing")


def _loading(files: Sequence[FileFacts]) -> Finding:
    rates = [each.read_bytes_per_s for each in files if each.read_bytes_per_s]
    if not rates:
        return absent("model: read", "no weights to read")
    seconds = files[0].weight_bytes / sum(rates)
    found = f"{format_bytes(min(rates))}/s or more by each node, cached or not: {format_duration(seconds)} for all weights"
    if seconds > SLOW_LOADING_S:
        fix = "copy the model to a faster file system, or stripe its folder over more servers (lfs setstripe)"
        return yellow("model: read", found, fix)
    return green("model: read", found)


def _readable_size(path: Path) -> int:
    try:
        with path.open("rb") as file:
            file.read(1)
            return os.fstat(file.fileno()).st_size
    except OSError:
        return -1
