"""Agreement at start: everything that a scheduling decision depends on is the same on all ranks of a replica."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from hpcinfer.comm.host import HostChannel
from hpcinfer.errors import HpcinferError, ReplicaDivergedError

Result = TypeVar("Result")


def agree(channel: HostChannel, *, minimum: dict[str, int], leader: dict[str, Any]) -> dict[str, Any]:
    """One agreement for a replica. Collective over `channel`.

    Args:
        channel: over the replica's ranks; rank 0 is the leader.
        minimum: figures of which the smallest over all ranks holds (block count, token budget).
        leader: settings of which the leader's value holds (backends, block size, thresholds).

    Returns:
        Both together, equal on all ranks.

    Raises:
        ReplicaDivergedError: ranks came with different names.
    """
    all_names = channel.all_gather((sorted(minimum), sorted(leader), minimum, leader if channel.rank == 0 else None))
    first_minimum, first_leader, _, leader_values = all_names[0]
    for rank, (minimum_names, leader_names, _, _) in enumerate(all_names):
        if (minimum_names, leader_names) != (first_minimum, first_leader):
            differing = sorted(set(minimum_names + leader_names) ^ set(first_minimum + first_leader))
            error = ReplicaDivergedError(
                f"rank {rank} of channel {channel.name!r} agrees on other names than the leader",
                found=f"only on one of the two: {', '.join(differing) or 'the same names in other groups'}",
                fix="all ranks must run the same version with the same job file",
            )
            error.agreed = True
            raise error
    smallest = {name: min(values[name] for _, _, values, _ in all_names) for name in minimum}
    return {**smallest, **leader_values}


def agree_or_raise(
    channel: HostChannel, function: Callable[[], Result], *, deadline_s: float | None = None
) -> Result:
    """Run `function` on rank 0 alone; every rank gets its result or raises its HpcinferError. Collective.

    The error has `agreed` set, so that `launch.report` prints it once. Any other exception is raised on rank 0 alone,
    which ends the world.

    Args:
        channel: over the ranks that must know.
        function: takes nothing; its result is pickled.
        deadline_s: how long the others wait for it, where that is longer than the channel's own deadline.
    """
    outcome: tuple[bool, Any] | None = None
    if channel.rank == 0:
        try:
            outcome = (True, function())
        except HpcinferError as error:
            outcome = (False, error)
    succeeded, value = channel.broadcast(outcome, deadline_s=deadline_s)
    if not succeeded:
        value.agreed = True
        raise value
    return value


def together(
    channel: HostChannel, function: Callable[[], Result], *, deadline_s: float | None = None
) -> Result:
    """Run `function` on every rank; each gets its own result. Where it raises an HpcinferError on any rank, all ranks
    raise the one of the lowest such rank, so that it is reported once. Collective.

    Args:
        channel: over the ranks that go on together.
        function: takes nothing and must not communicate over `channel`.
        deadline_s: how long a rank waits for the slowest one, where that is longer than the channel's own deadline.
    """
    error: HpcinferError | None = None
    try:
        result = function()
    except HpcinferError as raised:
        error = raised
    first = next((found for found in channel.all_gather(error, deadline_s=deadline_s) if found is not None), None)
    if first is not None:
        first.agreed = True
        raise first
    return result
