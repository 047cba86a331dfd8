"""A request to stop soon, made by a signal and polled by the loop that does the work."""

from __future__ import annotations

import signal
import types
from collections.abc import Iterable


class DrainFlag:
    """Set by SIGUSR1 (Slurm's warning before the end) or SIGTERM; the loop then commits what it has and leaves.

        drain = DrainFlag()
        drain.install()
        while not drain: step()

    The handler does nothing but set the flag, so that it is safe at any point of the program.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._previous: dict[int, object] = {}

    def __bool__(self) -> bool:
        return self._signal != 0

    @property
    def reason(self) -> str:
        """Name of the signal that asked ("SIGUSR1"), or "" ."""
        return signal.Signals(self._signal).name if self._signal else ""

    def set(self, signal_number: int = signal.SIGUSR1) -> None:
        """Ask for a drain without a signal (a test, a time limit)."""
        self._signal = self._signal or int(signal_number)

    def install(self, signals: Iterable[int] = (signal.SIGUSR1, signal.SIGTERM)) -> None:
        """Handle these signals from now on. Only the main thread can do it."""
        for number in signals:
            self._previous[number] = signal.signal(number, self._handle)

    def uninstall(self) -> None:
        """Put back the handlers of before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        self._signal = self._signal or number
