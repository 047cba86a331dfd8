"""A communicator whose transfers only take time, for exact tests of what a schedule hides. It needs no processor.

Transfers of a link run one after the other, in the order of their issue. Time is virtual, or that of the machine:
computation calls `clock.compute(seconds)` in both cases.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from hpcinfer.comm.communicator import Communicator, Handle


class VirtualClock:
    """Seconds that pass by being told to."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.computed_s = 0.0

    def compute(self, seconds: float) -> None:
        self.now_s += seconds
        self.computed_s += seconds

    def wait_until(self, end_s: float) -> float:
        """Let the time pass until `end_s`; returns how long that was."""
        waited_s = max(0.0, end_s - self.now_s)
        self.now_s += waited_s
        return waited_s


class SleepingClock:
    """Seconds of the machine; computation and transfers are sleeps."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()
        self.computed_s = 0.0

    @property
    def now_s(self) -> float:
        return time.perf_counter() - self._start_s

    def compute(self, seconds: float) -> None:
        start_s = self.now_s
        time.sleep(seconds)
        self.computed_s += self.now_s - start_s

    def wait_until(self, end_s: float) -> float:
        start_s = self.now_s
        time.sleep(max(0.0, end_s - start_s))
        return self.now_s - start_s


@dataclasses.dataclass(kw_only=True)
class Transfer:
    """One transfer of a FakeCommunicator."""

    label: str
    issued_s: float
    start_s: float
    end_s: float
    exposed_s: float = 0.0
    """How long a caller stood still for it."""


class FakeHandle(Handle):
    def __init__(self, communicator: FakeCommunicator, transfer: Transfer, result: torch.Tensor | None) -> None:
        self._communicator = communicator
        self._transfer = transfer
        self._result = result
        self.label = transfer.label

    def wait(self) -> torch.Tensor | None:
        waited_s = self._communicator.clock.wait_until(self._transfer.end_s)
        self._transfer.exposed_s += waited_s
        self._communicator.counters.wait_s += waited_s
        return self._result

    def done(self) -> bool:
        return self._communicator.clock.now_s >= self._transfer.end_s


class FakeCommunicator(Communicator):
    """One rank of `size`: collectives give this rank's own tensor, repeated where a gather wants more of it.

    Args:
        clock: of the computation too.
        duration_s: seconds on the link for a tensor that is handed in; 0 bytes take none.
        on_issue: called before each transfer, with its tensor: the computation that led to it.
    """

    def __init__(
        self,
        clock: VirtualClock | SleepingClock,
        duration_s: Callable[[torch.Tensor], float],
        *,
        size: int = 2,
        on_issue: Callable[[torch.Tensor], None] = lambda tensor: None,
    ) -> None:
        super().__init__("fake", 0, size, torch.device("cpu"))
        self.clock = clock
        self.transfers: list[Transfer] = []
        self._duration_s = duration_s
        self._on_issue = on_issue

    @property
    def exposed_s(self) -> float:
        return sum(transfer.exposed_s for transfer in self.transfers)

    def timed(self, duration_s: float, label: str) -> Handle:
        """A transfer of nothing that takes `duration_s`."""
        return self._put(duration_s, label, None)

    def barrier(self) -> None:
        return None

    def _issue(self, tensor: torch.Tensor, label: str, result: torch.Tensor | None) -> Handle:
        self._on_issue(tensor)
        return self._put(self._duration_s(tensor), label, result)

    def _put(self, duration_s: float, label: str, result: torch.Tensor | None) -> Handle:
        now_s = self.clock.now_s
        start_s = max(now_s, self.transfers[-1].end_s if self.transfers else 0.0)
        self.transfers.append(Transfer(label=label, issued_s=now_s, start_s=start_s, end_s=start_s + duration_s))
        return FakeHandle(self, self.transfers[-1], result)

    def _all_reduce(self, tensor: torch.Tensor, op: str, label: str) -> Handle:
        return self._issue(tensor, label, tensor)

    def _all_gather(self, tensor: torch.Tensor, label: str) -> Handle:
        return self._issue(tensor, label, torch.cat([tensor] * self.size))

    def _reduce_scatter(self, tensor: torch.Tensor, label: str) -> Handle:
        return self._issue(tensor, label, tensor[: tensor.shape[0] // self.size])

    def _broadcast(self, tensor: torch.Tensor, root: int, label: str) -> Handle:
        return self._issue(tensor, label, tensor)

    def _all_to_all(self, tensor: torch.Tensor, send_counts: list[int], recv_counts: list[int], label: str) -> Handle:
        return self._issue(tensor, label, tensor.new_zeros((sum(recv_counts), *tensor.shape[1:])))

    def _send(self, tensor: torch.Tensor, peer: int, label: str) -> Handle:
        return self._issue(tensor, label, None)

    def _recv(self, tensor: torch.Tensor, peer: int, label: str) -> Handle:
        return self._issue(tensor, label, tensor)
