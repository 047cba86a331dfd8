"""The links of a stage: activations from the stage before, activations to the stage after.

Shape letters: P tokens of the microbatch on this rank (`parallel.tensor`), D model.
"""

from __future__ import annotations

import collections

import torch

from hpcinfer.comm.communicator import Communicator, Handle

UPSTREAM, DOWNSTREAM = 0, 1
"""Ranks in the communicator of an ordered pair of neighbouring stages."""


class Outbox:
    """Sends that nobody waits for one by one. A handle owns its buffers, so somebody has to hold it."""

    def __init__(self) -> None:
        self._sending: collections.deque[Handle] = collections.deque()

    def add(self, handle: Handle) -> None:
        """Hold a send; let go of those that are over."""
        while self._sending and self._sending[0].done():
            self._sending.popleft().wait()
        self._sending.append(handle)

    def drain(self) -> None:
        """Return when everything has left."""
        while self._sending:
            self._sending.popleft().wait()


class StageLinks:
    """Transfers between this rank and the same tp rank of the neighbouring stages.

    Args:
        from_previous: communicator with the stage before, None on the first stage.
        to_next: communicator with the stage after, None on the last stage.
        hidden_size: D.
        dtype: of the activations.
        device: of the activations.
    """

    def __init__(
        self,
        from_previous: Communicator | None,
        to_next: Communicator | None,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._from_previous = from_previous
        self._to_next = to_next
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._device = device
        self._outbox = Outbox()

    @property
    def is_first(self) -> bool:
        return self._from_previous is None

    @property
    def is_last(self) -> bool:
        return self._to_next is None

    def empty(self) -> torch.Tensor:
        """The activations of a microbatch without tokens, [0, D]; they do not travel."""
        return torch.empty(0, self._hidden_size, dtype=self._dtype, device=self._device)

    def receive(self, num_rows: int) -> Handle:
        """Post the receive of a microbatch's activations. Result: [P, D]."""
        hidden = torch.empty(num_rows, self._hidden_size, dtype=self._dtype, device=self._device)
        return self._from_previous.recv(hidden, UPSTREAM, label="activations")

    def send(self, hidden: torch.Tensor) -> None:
        """Start sending activations [P, D] to the next stage; the next microbatch need not wait for it."""
        self._outbox.add(self._to_next.send(hidden.contiguous(), DOWNSTREAM, label="activations"))

    def drain(self) -> None:
        """Return when everything sent has left."""
        self._outbox.drain()
