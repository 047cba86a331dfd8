"""The message of a tick: everything that the replicated schedulers may learn, and when they learn it."""

from __future__ import annotations

import dataclasses

import numpy as np

from hpcinfer.request import Request


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TickMessage:
    """What the leader tells every rank of its replica before tick `tick`.

    It carries exactly the results up to tick - lag, never "what has arrived", so that all ranks decide the same.
    """

    tick: int
    requests: tuple[Request, ...] = ()
    """New sequences, in the order in which they queue."""
    result_ids: np.ndarray
    """int64 [S]: sequences whose token of tick - lag is told here."""
    result_tokens: np.ndarray
    """int64 [S]: those tokens."""
    stopped_ids: tuple[int, ...] = ()
    """Those of these sequences that the token ends with a stop text: the leader alone can read."""
    state_hash: int
    """Hash of the leader's scheduler before this message; another value on any rank is an error."""
    give_back: bool = False
    """Give up the sequences that have not begun: nothing is lost with them. Those that have begun go on."""
    drain: bool = False
    """Give up all sequences, keeping what they have: they become partial rows."""
    stop: bool = False
    """The replica's last tick: nothing is computed."""
