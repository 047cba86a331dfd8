"""A request to stop soon, made by signals and polled by the loop that does the work."""

from __future__ import annotations

import signal
import time
import types
from collections.abc import Callable, Iterable

ONE_ACT_S = 1.0
"""Signals this close together are one request: Slurm and launchers may deliver the same one twice, by two ways."""


class DrainFlag:
    """Set by SIGUSR1 (Slurm's warning before the end) or SIGTERM; the loop then begins nothing more, and leaves.

        drain = DrainFlag()
        drain.install()
        while not drain: step()

    The handler does nothing but note what came, so that it is safe at any point of the program. Facts are only ever added, so
    that any thread may look and add.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.reason = ""
        """Who asked first: name of a signal ("SIGUSR1"), or other words; "" while nobody has."""
        self.is_urgent = False
        """SIGTERM was among the signals: Slurm and launchers kill soon after it."""
        self.is_repeated = False
        """It was asked for again: whatever is waited for, wait no longer."""
        self.is_interrupted = False
        """SIGINT came. It raises KeyboardInterrupt where it finds the program, which Python drops inside of finalizers and of the import
        system's callbacks: whoever polls raises it again."""
        self.signal_number = 0
        """The last signal that this process got; 0 before."""
        self._clock = clock
        self._signalled_s: float | None = None
        self._previous: dict[int, object] = {}

    def __bool__(self) -> bool:
        return bool(self.reason)

    def ask(self, reason: str, *, urgent: bool = False, repeated: bool = False) -> None:
        """Ask for a drain without a signal to this process: the end of a time limit, a signal to another rank."""
        self.is_urgent = self.is_urgent or urgent
        self.is_repeated = self.is_repeated or repeated
        self.reason = self.reason or reason

    def install(self, signals: Iterable[int] = (signal.SIGUSR1, signal.SIGTERM)) -> None:
        """Handle these signals, and Ctrl-C, from now on. Only the main thread can do it."""
        for number in signals:
            self._previous[number] = signal.signal(number, self._handle)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored (nohup), or somebody else's
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)

    def uninstall(self) -> None:
        """Put back the handlers of before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _interrupt(self, number: int, frame: types.FrameType | None) -> None:
        self.is_interrupted = True
        raise KeyboardInterrupt

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        now = self._clock()
        if self._signalled_s is None:
            self._signalled_s = now
        repeated = now - self._signalled_s >= ONE_ACT_S
        self.ask(signal.Signals(number).name, urgent=number == signal.SIGTERM, repeated=repeated)
        self.signal_number = number
