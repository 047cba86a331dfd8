"""Several ranks of a mesh axis in one process, without MPI: their forwards are stepped together.

Each rank's generator runs to its next transfer; all ranks must have issued the same one; its result is computed from
the tensors of all ranks and every generator is resumed with it. For tests of layers and models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hpcinfer.comm.communicator import Communicator, Handle
from hpcinfer.parallel.segments import Segments, run_to_end


class PendingTransfer(Handle):
    """What one rank has issued; finished by `run_lockstep` only."""

    def __init__(self, verb: str, tensor: torch.Tensor, label: str) -> None:
        self.verb = verb
        self.tensor = tensor
        self.label = label

    @property
    def kind(self) -> tuple:
        return (self.verb, self.label, tuple(self.tensor.shape), self.tensor.dtype)

    def wait(self) -> torch.Tensor:
        raise AssertionError("a layer waited for a transfer instead of yielding its handle")

    def done(self) -> bool:
        return False


class LockstepCommunicator(Communicator):
    """One rank of `size` that are stepped together. Only the verbs that layers use."""

    def __init__(self, rank: int, size: int, name: str = "tp") -> None:
        super().__init__(name, rank, size, torch.device("cpu"))

    def barrier(self) -> None:
        return None

    def _all_reduce(self, tensor: torch.Tensor, op: str, label: str) -> Handle:
        return PendingTransfer(f"all_reduce {op}", tensor, label)

    def _all_gather(self, tensor: torch.Tensor, label: str) -> Handle:
        return PendingTransfer("all_gather", tensor, label)

    def _reduce_scatter(self, tensor, label):
        raise NotImplementedError

    def _broadcast(self, tensor, root, label):
        raise NotImplementedError

    def _all_to_all(self, tensor, send_counts, recv_counts, label):
        raise NotImplementedError

    def _send(self, tensor, peer, label):
        raise NotImplementedError

    def _recv(self, tensor, peer, label):
        raise NotImplementedError


def run_lockstep(forwards: Sequence[Segments], log: list | None = None) -> list[torch.Tensor]:
    """Drive the forwards of all ranks, in rank order. Returns each rank's result.

    Args:
        log: gets the (verb, label, shape, dtype) of every transfer.
    """
    if len(forwards) == 1:
        return [run_to_end(forwards[0])]
    results: list[torch.Tensor | None] = [None] * len(forwards)
    while True:
        handles, values = [], []
        for forward, result in zip(forwards, results):
            try:
                handles.append(next(forward) if result is None else forward.send(result))
            except StopIteration as end:
                values.append(end.value)
        if values:
            assert len(values) == len(forwards), "some ranks ended while others wait for a transfer"
            return values
        kinds = {handle.kind for handle in handles}
        assert len(kinds) == 1, f"ranks issued different transfers: {kinds}"
        if log is not None:
            log.append(handles[0].kind)
        if handles[0].verb == "all_gather":
            whole = torch.cat([handle.tensor for handle in handles])
        else:
            whole = torch.stack([handle.tensor for handle in handles]).sum(0)
        results = [whole.clone() for _ in handles]
