"""The tensors of a Hugging Face folder. Only safetensors: never pickle, never code from the folder."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path

from hpcinfer.config.model import ModelConfig
from hpcinfer.errors import CheckpointError
from hpcinfer.models.base import StageModel
from hpcinfer.models.safetensors_file import TensorEntry, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Most names in one error message.
_NAMED = 8


class Checkpoint:
    """The tensors of a folder with model.safetensors, or with shards and model.safetensors.index.json: what they are and
    where they lie. It holds no data and no open file, and can be pickled.

    Raises:
        CheckpointError: nothing in safetensors, missing shards (named), a damaged file or index.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if (self.folder / SINGLE_FILE).is_file():
            self._entries = read_header(self.folder / SINGLE_FILE)
        elif (self.folder / INDEX_FILE).is_file():
            self._entries = _read_shards(self.folder)
        else:
            raise _nothing_to_read(self.folder)

    def named_for(self, model: type[StageModel]) -> Checkpoint:
        """The same tensors under the names that `model` has for them.

        Raises:
            CheckpointError: two tensors get the same name.
        """
        entries: dict[str, TensorEntry] = {}
        for name, entry in sorted(self._entries.items()):
            ours = model.canonical_name(name)
            if ours in entries:
                raise CheckpointError(
                    f"two tensors in {str(self.folder)!r} are the same one of the model",
                    found=f"{entries[ours].name} and {entry.name}",
                )
            entries[ours] = entry
        view = copy.copy(self)
        view._entries = entries
        return view

    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._entries)

    def entry(self, name: str) -> TensorEntry:
        """Dtype, shape and place of a tensor."""
        return self._entries[name]


def check_tensors(checkpoint: Checkpoint, model: type[StageModel], config: ModelConfig) -> None:
    """Compare the checkpoint with what the whole model needs.

    Raises:
        CheckpointError: tensors are missing, left over or of another shape; names them.
    """
    checkpoint = checkpoint.named_for(model)
    wanted, present = model.checkpoint_shapes(config), checkpoint.names()
    missing = [name for name in wanted if name not in present]
    extra = sorted(name for name in present if name not in wanted and not model.is_ignored(config, name))
    wrong = [
        f"{name} {checkpoint.entry(name).shape} instead of {shape}"
        for name, shape in wanted.items() if name in present and checkpoint.entry(name).shape != shape
    ]
    parts = [
        f"{len(names)} {what}: {_some(names)}"
        for what, names in (("missing", missing), ("not part of the model", extra), ("of a wrong shape", wrong))
        if names
    ]
    if parts:
        raise CheckpointError(
            f"the tensors in {str(checkpoint.folder)!r} are not those of the {config.family} that its config.json says",
            found="; ".join(parts), fix="use the config.json that belongs to these weights, and all of its files",
        )


def _read_shards(folder: Path) -> dict[str, TensorEntry]:
    index = folder / INDEX_FILE
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shard_names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged", found=repr(error), fix="download or copy the file again") from None
    unsafe = [name for name in shard_names if Path(name).name != name]
    if unsafe:
        raise CheckpointError(f"{index} names files outside its folder", found=_some(unsafe))
    missing = [name for name in shard_names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"shards of the checkpoint are missing in {str(folder)!r}",
            found=f"{len(missing)} of {len(shard_names)}: {_some(missing)}", fix="download or copy them again",
        )
    files = {name: read_header(folder / name) for name in shard_names}
    absent = [tensor for tensor, name in weight_map.items() if tensor not in files[name]]
    if absent:
        raise CheckpointError(f"{index} names tensors that its shards do not have", found=_some(absent))
    return {tensor: files[name][tensor] for tensor, name in weight_map.items()}


def _nothing_to_read(folder: Path) -> CheckpointError:
    if not folder.is_dir():
        return CheckpointError(f"no model folder {str(folder)!r}", fix="give a Hugging Face folder")
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickles:
        return CheckpointError(
            f"the weights in {str(folder)!r} are pickle files, which may run code and are never read",
            found=_some(pickles),
            fix="convert them on a trusted machine: AutoModelForCausalLM.from_pretrained(A).save_pretrained(B) of "
                "transformers writes safetensors",
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    return CheckpointError(
        f"no weights in {str(folder)!r}",
        found=f"{_some(others)} without {INDEX_FILE}" if others else "no safetensors file",
        fix=f"the folder needs {SINGLE_FILE}, or shards with {INDEX_FILE}",
    )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
