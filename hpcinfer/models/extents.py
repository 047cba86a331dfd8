"""How the bytes of a checkpoint are divided for reading: every byte that the model needs is in one extent, and no other is.

The needed tensors are thought to lie end to end, in the order of their files, and that line is cut every `extent_bytes`:
small neighbours share an extent, a large tensor spans several, what nobody needs is skipped. A function of the headers
alone, so that all ranks come to the same extents without a word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from hpcinfer.models.safetensors_file import TensorEntry

EXTENT_BYTES = 64 * 2**20
"""Large enough for the full rate of a parallel file system and of a broadcast, small beside any model worth it."""
MAX_EXTENT_BYTES = 2**30
"""MPI counts the elements of a transfer in 32 bits."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A part of a tensor, or all of it, in an extent."""

    name: str
    """Of the tensor in the model."""
    path: Path
    start: int
    """First byte in the file."""
    num_bytes: int
    offset: int
    """First byte in the extent."""
    tensor_offset: int
    """First byte in the tensor."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FileRange:
    """Consecutive bytes of a file that an extent has."""

    path: Path
    start: int
    """First byte in the file."""
    num_bytes: int
    offset: int
    """First byte in the extent."""


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
    """What is read and sent at once."""

    pieces: tuple[Piece, ...]
    """In the order of their offsets, without gaps; at least one."""

    @property
    def num_bytes(self) -> int:
        return self.pieces[-1].offset + self.pieces[-1].num_bytes

    def ranges(self, most_bytes: int = MAX_EXTENT_BYTES) -> Iterator[FileRange]:
        """The same bytes as few ranges of files, each of at most `most_bytes`."""
        first = 0
        while first < len(self.pieces):
            head = self.pieces[first]
            end = head.start
            while first < len(self.pieces) and (self.pieces[first].path, self.pieces[first].start) == (head.path, end):
                end += self.pieces[first].num_bytes
                first += 1
            for start in range(head.start, end, most_bytes):
                yield FileRange(
                    path=head.path, start=start, num_bytes=min(most_bytes, end - start),
                    offset=head.offset + start - head.start,
                )


def plan_extents(entries: Mapping[str, TensorEntry], extent_bytes: int = EXTENT_BYTES) -> list[Extent]:
    """Divide tensors into extents.

    Args:
        entries: name in the model -> its place, of the tensors that any rank needs.
        extent_bytes: bytes of every extent but the last.
    """
    assert 1 <= extent_bytes <= MAX_EXTENT_BYTES
    extents: list[Extent] = []
    pieces: list[Piece] = []
    filled = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].path, item[1].start)):
        done = 0
        while done < entry.num_bytes:
            count = min(entry.num_bytes - done, extent_bytes - filled)
            pieces.append(
                Piece(
                    name=name, path=entry.path, start=entry.start + done, num_bytes=count, offset=filled, tensor_offset=done
                )
            )
            done += count
            filled += count
            if filled == extent_bytes:
                extents.append(Extent(tuple(pieces)))
                pieces, filled = [], 0
    if pieces:
        extents.append(Extent(tuple(pieces)))
    return extents
