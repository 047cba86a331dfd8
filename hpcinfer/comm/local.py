"""The communicator of a single rank: every collective is the identity."""

from __future__ import annotations

import torch

from hpcinfer.comm.communicator import Communicator, FinishedHandle, Handle
from hpcinfer.errors import CommunicationError


class LocalCommunicator(Communicator):
    """A communicator of size 1. Layers run on it unchanged when their axis is not split."""

    def __init__(self, name: str, device: torch.device = torch.device("cpu")) -> None:
        super().__init__(name, rank=0, size=1, device=device)

    def barrier(self) -> None:
        return None

    def _all_reduce(self, tensor: torch.Tensor, op: str, label: str) -> Handle:
        return FinishedHandle(tensor, label)

    def _all_gather(self, tensor: torch.Tensor, label: str) -> Handle:
        return FinishedHandle(tensor, label)

    def _reduce_scatter(self, tensor: torch.Tensor, label: str) -> Handle:
        return FinishedHandle(tensor, label)

    def _broadcast(self, tensor: torch.Tensor, root: int, label: str) -> Handle:
        return FinishedHandle(tensor, label)

    def _all_to_all(
        self, tensor: torch.Tensor, send_counts: list[int], recv_counts: list[int], label: str
    ) -> Handle:
        if send_counts != recv_counts:
            raise self._misuse("all_to_all", f"send {send_counts}, receive {recv_counts}", "equal counts")
        return FinishedHandle(tensor, label)

    def _send(self, tensor: torch.Tensor, peer: int, label: str) -> Handle:
        raise CommunicationError(f"send on communicator {self.name!r} of one rank", fix="a rank has no peer here")

    def _recv(self, tensor: torch.Tensor, peer: int, label: str) -> Handle:
        raise CommunicationError(f"recv on communicator {self.name!r} of one rank", fix="a rank has no peer here")
