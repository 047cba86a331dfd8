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

    def __init__(
        self, verb: str, tensor: torch.Tensor, label: str, members: tuple[int, ...] | None,
        send_counts: list[int] | None = None, recv_counts: list[int] | None = None,
    ) -> None:
        self.verb = verb
        self.tensor = tensor
        self.label = label
        self.members = members
        self.send_counts = send_counts
        self.recv_counts = recv_counts

    @property
    def kind(self) -> tuple:
        """What must be the same on all ranks. The rows of an all-to-all may differ."""
        shape = tuple(self.tensor.shape)
        return (self.verb, self.label, shape if self.send_counts is None else shape[1:], self.tensor.dtype)

    def wait(self) -> torch.Tensor:
        raise AssertionError("a layer waited for a transfer instead of yielding its handle")

    def done(self) -> bool:
        return False


class LockstepCommunicator(Communicator):
    """One rank of `size` that are stepped together. Only the verbs that layers use.

    Args:
        members: by rank, the index of each one's forward in `run_lockstep`. None: they are all of them, in order.
    """

    def __init__(self, rank: int, size: int, name: str = "tp", members: tuple[int, ...] | None = None) -> None:
        super().__init__(name, rank, size, torch.device("cpu"))
        assert members is None or len(members) == size
        self._members = members

    def barrier(self) -> None:
        return None

    def _all_reduce(self, tensor: torch.Tensor, op: str, label: str) -> Handle:
        return PendingTransfer(f"all_reduce {op}", tensor, label, self._members)

    def _all_gather(self, tensor: torch.Tensor, label: str) -> Handle:
        return PendingTransfer("all_gather", tensor, label, self._members)

    def _reduce_scatter(self, tensor: torch.Tensor, label: str) -> Handle:
        return PendingTransfer("reduce_scatter", tensor, label, self._members)

    def _broadcast(self, tensor, root, label):
        raise NotImplementedError

    def _all_to_all(
        self, tensor: torch.Tensor, send_counts: list[int], recv_counts: list[int], label: str
    ) -> Handle:
        return PendingTransfer("all_to_all", tensor, label, self._members, send_counts, recv_counts)

    def _send(self, tensor, peer, label):
        raise NotImplementedError

    def _recv(self, tensor, peer, label):
        raise NotImplementedError


def run_lockstep(forwards: Sequence[Segments], log: list | None = None) -> list[torch.Tensor]:
    """Drive the forwards of all ranks, in rank order. Returns each rank's result.

    Args:
        log: gets the (verb, label, shape, dtype) of every transfer, once a group of ranks.
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
        for index, handle in enumerate(handles):
            if not isinstance(handle, PendingTransfer):
                results[index] = handle.wait()  # a communicator of one rank
                continue
            members = handle.members or tuple(range(len(handles)))
            if index == members[0]:
                _transfer(members, handles, results, log)
            else:
                assert getattr(handles[members[0]], "members", ()) == handle.members, "ranks issued different transfers"


def _transfer(members: tuple[int, ...], handles: list, results: list, log: list | None) -> None:
    """Compute the results of one group's transfer from the tensors of its ranks."""
    group = [handles[index] for index in members]
    kinds = {getattr(handle, "kind", None) for handle in group}
    assert len(kinds) == 1, f"ranks issued different transfers: {kinds}"
    if log is not None:
        log.append(group[0].kind)
    tensors, verb = [handle.tensor for handle in group], group[0].verb
    if verb == "all_to_all":
        parts = [handle.tensor.split(handle.send_counts) for handle in group]
        for rank, index in enumerate(members):
            received = [part[rank] for part in parts]
            assert [len(rows) for rows in received] == group[rank].recv_counts, "counts of an all-to-all do not match"
            results[index] = torch.cat(received)
        return
    if verb == "all_gather":
        whole = torch.cat(tensors)
    elif verb == "all_reduce max":
        whole = torch.stack(tensors).amax(0)
    else:
        assert verb in ("all_reduce sum", "reduce_scatter"), verb
        whole = torch.stack(tensors).sum(0)
    rows = whole.shape[0] // len(members)
    for rank, index in enumerate(members):
        mine = whole[rank * rows : (rank + 1) * rows] if verb == "reduce_scatter" else whole
        results[index] = mine.clone()
