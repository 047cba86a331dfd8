"""The communicators that the layers of one stage use, in one bundle."""

from __future__ import annotations

import dataclasses

from hpcinfer.comm.communicator import Communicator
from hpcinfer.comm.local import LocalCommunicator


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageAxes:
    """What splits the layers of a stage, as one rank sees it."""

    tp: Communicator
    """Among the tp ranks of this lane: weights are split over them."""
    sp: Communicator = dataclasses.field(default_factory=lambda: LocalCommunicator("sp"))
    """Among the ranks with this tp rank in all lanes: a prompt's tokens are split over them in prefill."""
    ep: Communicator = dataclasses.field(default_factory=lambda: LocalCommunicator("ep"))
    """The ranks over which experts are spread: this rank alone (ep = 1), `tp` itself (ep = tp), or one among all lanes and tp
    ranks of the stage, by lane * tp + tp rank (ep = sp * tp with sp > 1)."""
    sequence_form: bool = False
    """The residual stream lies in token shards on the tp ranks (see `parallel.tensor`)."""

    @property
    def ep_spans_lanes(self) -> bool:
        """True where tokens travel to experts on ranks that do not have them."""
        return self.ep is not self.tp and self.ep.size > 1
