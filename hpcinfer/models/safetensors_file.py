"""The header of a safetensors file, read and checked: where each of its tensors lies.

The format (huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON object name -> dtype, shape
and data_offsets relative to the end of the header, then the data. Read here and not by the safetensors package, so that
a damaged file is named with what is wrong, and so that data can be read as large byte ranges by few ranks.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import torch

from hpcinfer.errors import CheckpointError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
# The format's own limit for the header.
_MAX_HEADER_BYTES = 100_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies."""

    name: str
    """In its file."""
    path: Path
    """The file."""
    dtype: str
    """The format's name, for example BF16."""
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    end: int
    """One past the last byte."""

    @property
    def num_bytes(self) -> int:
        return self.end - self.start

    @property
    def torch_dtype(self) -> torch.dtype:
        """Raises CheckpointError for a dtype that is not supported."""
        dtype = DTYPES.get(self.dtype)
        if dtype is None:
            raise CheckpointError(
                f"tensor {self.name!r} in {self.path} has a dtype that is not supported",
                found=self.dtype, fix="use the checkpoint in float32, bfloat16 or float16",
            )
        return dtype


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Name -> place of every tensor of a file. No two share a byte.

    Raises:
        CheckpointError: the file cannot be read, its header is damaged, or data are missing at its end.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise _damaged(path, f"{size} bytes, and the first 8 say a header of {length}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}", found=str(error)) from None
    except ValueError as error:
        raise _damaged(path, f"a header that is not JSON: {error}") from None
    try:
        header.pop("__metadata__", None)
        entries = {name: _entry(path, name, raw, 8 + length, size) for name, raw in header.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, f"a header entry that is not as the format says: {error!r}") from None
    for one, other in itertools.pairwise(sorted(entries.values(), key=lambda entry: (entry.start, entry.end))):
        if other.start < one.end:
            raise _damaged(path, f"tensors {one.name!r} and {other.name!r} overlap")
    return entries


def _entry(path: Path, name: str, raw: dict, base: int, size: int) -> TensorEntry:
    start, end = (base + int(offset) for offset in raw["data_offsets"])
    entry = TensorEntry(name, path, str(raw["dtype"]), tuple(int(n) for n in raw["shape"]), start, end)
    if not base <= start <= end <= size:
        raise _damaged(path, f"tensor {name!r} ends at byte {end}, the file has {size}")
    dtype = DTYPES.get(entry.dtype)
    if dtype is not None and math.prod(entry.shape) * dtype.itemsize != end - start:
        raise _damaged(path, f"tensor {name!r} of shape {entry.shape} and dtype {entry.dtype} in {end - start} bytes")
    return entry


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged or incomplete", found=found, fix="download or copy the file again")
