"""Trying a file system in the way the ledger uses it: whole files by rename, seen everywhere, and names that one rank gets.

Everything happens in a folder of its own, which no reader of a run directory looks at, and which is removed.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hpcinfer.comm.host import HostChannel
from hpcinfer.data.ledger.commit import TEMPORARY_PREFIX, claim_name, commit_bytes, create_new
from hpcinfer.doctor.finding import RankPlace

SMALL_BYTES = 64 * 2**10
LARGE_BYTES = 16 * 2**20
NUM_NAMES = 32
"""Names that ranks compete for: even ones by O_EXCL, odd ones by link()."""
APPEAR_S = 5.0
"""How long a rank looks for the file of another one."""
_SMALL_COMMITS = 5
_NAMES_A_ROUND = 4
_RANKS_A_NODE = 2
"""So many of each node take part: many more would only load the server."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StorageFacts:
    """What one rank found out."""

    place: RankPlace
    folder: str
    """Where it wrote: data.output, or the nearest folder above it that exists."""
    took_part: bool = True
    error: str = ""
    """Why it could not write, or not read what another rank wrote."""
    error_number: int = 0
    commit_s: float = 0.0
    """Median time of a small file: write, fsync, rename, fsync of the folder."""
    write_bytes_per_s: float = 0.0
    """Of a large file, fsync and rename included."""
    read_bytes_per_s: float = 0.0
    """Of another rank's large file, not out of this node's cache where that can be avoided."""
    appeared_s: float | None = 0.0
    """When this rank saw the file of another one, after that one had said that it is there; None: not within APPEAR_S."""
    won: tuple[int, ...] = ()
    """Numbers of the names that this rank was told it has, one of them twice where it was told so twice."""


def gather_storage(
    channel: HostChannel, places: Sequence[RankPlace], target: Path, *, meet: Callable[[], None] = lambda: None
) -> StorageFacts:
    """Try the file system of `target`. Collective; some ranks of each node take part.

    Args:
        places: of all ranks, in rank order.
        meet: waits for all ranks, where some may be stuck in the file system.
    """
    place = places[channel.rank]
    above = nearest_folder(target)
    folder = above / channel.broadcast(f"{TEMPORARY_PREFIX}doctor.{os.getpid()}.{os.urandom(4).hex()}")
    facts = StorageFacts(place=place, folder=str(above), took_part=place.local_rank < _RANKS_A_NODE)
    if facts.took_part:
        facts = _write(facts, folder)
    meet()
    members = channel.all_gather(facts.took_part and not facts.error)
    takes_part = members[channel.rank]
    if takes_part:
        facts = _read(facts, folder, _partner(places, members, place.rank))
    won: list[int] = []
    for first in range(0, NUM_NAMES, _NAMES_A_ROUND):
        channel.barrier()  # so that they come to the same names at the same time
        if takes_part:
            won += _compete(folder, range(first, first + _NAMES_A_ROUND), place.rank)
    channel.barrier()
    if facts.took_part:
        shutil.rmtree(folder, ignore_errors=True)
    return dataclasses.replace(facts, won=tuple(won))


def nearest_folder(target: Path) -> Path:
    """`target`, or the nearest folder above it that exists."""
    target = target.absolute()
    return next(folder for folder in (target, *target.parents) if os.path.isdir(folder))  # Path.is_dir raises where it may not look


def read_rate(path: Path, num_bytes: int = LARGE_BYTES, *, offset: int = 0, drop: bool = True) -> float:
    """Bytes per second of reading a part of a file. Raises OSError.

    Args:
        drop: ask the kernel to forget its copy before; only for files that nobody else needs.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if drop:
            os.posix_fadvise(descriptor, offset, num_bytes, os.POSIX_FADV_DONTNEED)
        began, taken = time.perf_counter(), 0
        while taken < num_bytes and (part := os.pread(descriptor, min(2**22, num_bytes - taken), offset + taken)):
            taken += len(part)
        return taken / max(time.perf_counter() - began, 1e-9)
    finally:
        os.close(descriptor)


def _write(facts: StorageFacts, folder: Path) -> StorageFacts:
    """Files of this rank: a few small ones, a large one, and the identity that its links point to."""
    rank = facts.place.rank
    try:
        folder.mkdir(exist_ok=True)
        times = [_commit(folder, f"small-{rank}-{number}", SMALL_BYTES) for number in range(_SMALL_COMMITS)]
        large_s = _commit(folder, _large_name(rank), LARGE_BYTES)
        commit_bytes(folder, _identity_name(rank), b'{"id": "%d"}' % rank)
    except OSError as error:
        return _failed(facts, error)
    return dataclasses.replace(facts, commit_s=statistics.median(times), write_bytes_per_s=LARGE_BYTES / large_s)


def _commit(folder: Path, name: str, num_bytes: int) -> float:
    data = os.urandom(num_bytes)
    began = time.perf_counter()
    commit_bytes(folder, name, data)
    return time.perf_counter() - began


def _partner(places: Sequence[RankPlace], members: Sequence[bool], rank: int) -> int:
    """The member whose file a rank reads: the next one on another node, else the next one."""
    others = [each for each in places if members[each.rank]]
    in_turn = [each for each in others if each.rank > rank] + [each for each in others if each.rank <= rank]
    return next((each.rank for each in in_turn if each.node != places[rank].node), in_turn[0].rank)


def _read(facts: StorageFacts, folder: Path, partner: int) -> StorageFacts:
    """Wait for the large file of another rank to be seen, and read it."""
    path = folder / _large_name(partner)
    began = time.perf_counter()
    while not path.exists():
        if time.perf_counter() - began > APPEAR_S:
            return dataclasses.replace(facts, appeared_s=None)
        time.sleep(0.05)
    appeared_s = time.perf_counter() - began
    try:
        return dataclasses.replace(facts, appeared_s=appeared_s, read_bytes_per_s=read_rate(path))
    except OSError as error:
        return _failed(facts, error)


def _compete(folder: Path, numbers: range, rank: int) -> list[int]:
    """Try to make names that all the others try to make too. Numbers of those that this rank was told it has."""
    won = []
    for number in numbers:
        name = f"name-{number}"
        try:
            if number % 2:
                won += [number] * claim_name(folder, name, str(rank), folder / _identity_name(rank))
            else:
                for _ in range(2):  # the second time it is there for certain
                    os.close(create_new(folder / name))
                    won.append(number)
        except OSError:
            continue
    return won


def _failed(facts: StorageFacts, error: OSError) -> StorageFacts:
    return dataclasses.replace(facts, error=str(error), error_number=error.errno or 0)


def _large_name(rank: int) -> str:
    return f"large-{rank}"


def _identity_name(rank: int) -> str:
    return f"identity-{rank}.json"
