"""What a check found, and the words for where it was found."""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol, TypeVar

from hpcinfer.errors import HpcinferError

Value = TypeVar("Value", bound=Hashable)
_NAMED = 6
"""Most hosts in one message."""


class Level(enum.StrEnum):
    """How a finding is meant."""

    GREEN = "green"
    YELLOW = "yellow"
    """The run works, slower or with less room than it could."""
    RED = "red"
    """The run would fail, hang or give less than what was asked for."""
    ABSENT = "not here"
    """This machine has nothing of the kind, or one process cannot see it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RankPlace:
    """Which rank a fact comes from."""

    rank: int = 0
    host: str = ""
    node: int = 0
    """Number of its node."""
    local_rank: int = 0
    """Its number on the node."""


class Placed(Protocol):
    """Facts of one rank."""

    @property
    def place(self) -> RankPlace: ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One row of the table."""

    check: str
    """What was looked at."""
    level: Level
    found: str
    """What is the case, with its numbers."""
    fix: str = ""
    """What to do about it; every red one has it."""
    where: tuple[str, ...] = ()
    """Hosts that it is about; (): all, or the machine as a whole."""


def green(check: str, found: str) -> Finding:
    """All is well."""
    return Finding(check=check, level=Level.GREEN, found=found)


def absent(check: str, found: str, fix: str = "") -> Finding:
    """Nothing of the kind is here; `fix`: how to have it checked."""
    return Finding(check=check, level=Level.ABSENT, found=found, fix=fix)


def yellow(check: str, found: str, fix: str, places: Iterable[RankPlace] = ()) -> Finding:
    """It works, not as well as it could."""
    return Finding(check=check, level=Level.YELLOW, found=found, fix=fix, where=hosts(places))


def red(check: str, found: str, fix: str, places: Iterable[RankPlace] = ()) -> Finding:
    """A run would fail of it."""
    return Finding(check=check, level=Level.RED, found=found, fix=fix, where=hosts(places))


def red_error(check: str, error: HpcinferError, places: Iterable[RankPlace] = ()) -> Finding:
    """The error that a run would end with."""
    found = f"{error.problem}: {error.found}" if error.found else error.problem
    return red(check, found, error.fix or "correct it, and look again", places)


def places_of(facts: Iterable[Placed]) -> list[RankPlace]:
    """Where some facts come from."""
    return [each.place for each in facts]


def hosts(places: Iterable[RankPlace]) -> tuple[str, ...]:
    """The hosts of some ranks, each once, in order."""
    return tuple(dict.fromkeys(place.host for place in places))


def who(places: Sequence[RankPlace]) -> str:
    """Ranks and their hosts in words: "ranks 0, 1 on n1; rank 5 on n2"."""
    on_host: dict[str, list[int]] = collections.defaultdict(list)
    for place in places:
        on_host[place.host].append(place.rank)
    parts = [f"rank{'s' if len(ranks) > 1 else ''} {_ranges(ranks)} on {host}" for host, ranks in on_host.items()]
    more = f" and {len(parts) - _NAMED} more hosts" if len(parts) > _NAMED else ""
    return "; ".join(parts[:_NAMED]) + more


def host_names(places: Iterable[RankPlace]) -> str:
    """The hosts of some ranks in words."""
    names = hosts(places)
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def by_value(pairs: Iterable[tuple[RankPlace, Value]]) -> dict[Value, list[RankPlace]]:
    """Value -> the ranks that have it, the value of most ranks first."""
    groups: dict[Value, list[RankPlace]] = collections.defaultdict(list)
    for place, value in pairs:
        groups[value].append(place)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
